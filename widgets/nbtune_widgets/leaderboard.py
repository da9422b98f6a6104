"""The live leaderboard of a sweep: how its trials stand, their curves, what the settings did, and the buttons.

    board = Leaderboard(sweep)
    board.show(); board.pump()     # blocks; papermill, a cell that should end with the sweep
    board.show(); board.start()    # returns; or: nt.sweep(...) as the last line of a cell

Everything is read from the sweep's folder and from the events of its runs; only what is new is read again. As in
`live.py`, one thread draws, callbacks put what is to be done on its queue, and what is kept in the notebook when the
sweep ends goes through two display handles.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from IPython.display import DisplayHandle, display

from nbtune.errors import NbtuneError
from nbtune.run import Run
from nbtune.sweep.importance import FEWEST, importance
from nbtune.sweep.space import Point
from nbtune.sweep.trial import Trial
from nbtune_widgets import _reports, _trialtable, sweepcharts
from nbtune_widgets._board import show_if
from nbtune_widgets._driver import Driver
from nbtune_widgets._style import chip, notice
from nbtune_widgets._sweepboard import SweepBoard
from nbtune_widgets._trialtable import Facts
from nbtune_widgets._worker import Worker
from nbtune_widgets.live import PUSH_SECONDS, empty, places

if TYPE_CHECKING:
    from nbtune.sweep.sweep import Sweep

FIRST = 25  # trials that are shown until more are asked for
BEST = 3  # trials that the arena compares
FEW = 20  # trials, below which importance is a hint at most
_WAITING = "The finished charts and the table of the trials will be kept here."

Act = Callable[[], Any]


class Leaderboard(SweepBoard, Driver):
    """Shows one sweep. `widget` is the box to place; `show()` displays it in this cell, with room for the result.

    Args:
        sweep: The sweep, live or not.
        interval: Seconds between two looks at it.
    """

    def __init__(self, sweep: Sweep, interval: float = 1.0) -> None:
        Driver.__init__(self, f"nbtune-board-{sweep.id}", "sweep", interval)
        SweepBoard.__init__(self, sweep.design.space, self._add, self._tell)
        self.sweep = sweep
        self.pushes = 0
        self.facts: list[Facts] = []  # in the order of the table
        self.kept: list[DisplayHandle] = []
        self._trials: dict[int, Trial] = {}
        self._runs: dict[int, Run] = {}  # by trial, the last that its notebook made
        self._losses: dict[int, tuple[int, tuple[list[Any], list[Any]]]] = {}  # by trial: of how many events, and they
        self._all = self._settled = False
        self._drawn: tuple[Any, ...] = ()
        self._pushed_at = 0.0
        self._times_shown = 0
        self._passing: tuple[str, Callable[[], bool]] = "", bool  # a notice, and whether it has had its time
        self._awaited: int | None = None  # how many trials there will be once the sweep has taken what was added
        self._worker: Worker | None = None
        for button, act in (
            (self.start_button, self._start), (self.add_button, self._open_adding),
            (self.arena_button, self._ask_arena), (self.stop_button, self._ask_to_stop_all),
            (self.more_button, self._show_all),
        ):  # fmt: skip
            button.on_click(lambda _, act=act: self._tell(act))
        self.widget._view_count = 0  # asks the front end to count
        self.widget.observe(self._seen, names="_view_count")
        self._refresh()

    def show(self) -> None:
        """Display the board in this cell, and under it two plain outputs that become the final charts and the table."""
        display(self.widget)
        self.kept = places(_WAITING if self.sweep.status == "running" else "")
        self._settled = False

    def keep_in(self, kept: list[DisplayHandle]) -> None:
        """Use places, made by `live.places`, of another cell."""
        self.kept = kept
        self._clear_kept()

    def _ipython_display_(self) -> None:
        self.show()

    def close(self) -> None:
        """Stop drawing and give the widgets back. The sweep goes on; what was kept in the notebook stays."""
        self._take_over()
        if self._worker is not None:
            self._worker.close()
        self.dispose()

    @property
    def best(self) -> Facts | None:
        """The best trial so far."""
        return self.facts[0] if self.facts and self.facts[0].counts else None

    def _interrupted(self) -> None:
        self._awaited = None
        self._tell(self.sweep.interrupt)

    def _seen(self, change: dict[str, Any]) -> None:
        """The card was drawn, or removed. Drawn again, after a reload of the page say, its kept places are lost."""
        if change["new"] > change["old"]:
            self._times_shown += 1
            if self._times_shown > 1:
                self._tell(self._draw_again)

    def _draw_again(self) -> None:
        """A page that has just opened may have missed the charts."""
        self.charts.outputs, self._drawn = (), ()

    def _step(self) -> bool:
        asked = False
        while not self._commands.empty():
            self._obey(self._commands.get())
            asked = True
        ended = self.sweep.status != "running"  # read before the trials, so that an end seen here has all of them
        if self._awaited is not None and (ended or len(self.sweep.trials) >= self._awaited):
            self._awaited = None
            if ended:
                self._obey(self._start)
                ended = self.sweep.status != "running"
        said, is_over = self._passing
        if said and said == self._notice.value and is_over():
            self.say("")
        if ended and self.sweep.error and not self._notice.value:
            self.say(notice(self.sweep.error, "error"))
        self._refresh()
        self._draw(asked=asked, ended=ended)
        return ended

    def _obey(self, act: Act) -> None:
        try:
            act()
        except NbtuneError as error:
            self.say(notice(str(error), "error"))

    def _refresh(self) -> None:
        """Everything but the charts. Setting a trait to what it is sends nothing, so this costs little."""
        status, design = self.sweep.status, self.sweep.design
        self._read()
        running, best = status == "running", self.best
        seconds = _trialtable.left(self.facts, self.sweep.jobs, self.sweep.to_come) if running else None
        self.tiles.value = _trialtable.tiles(self.facts, best, seconds, self.sweep.to_come, running=running)
        self.bar.value = self._share_done()
        title = f'<span class="nt-name" title="{escape(str(self.sweep.path))}">{escape(self.sweep.id)}</span>'
        how = chip(("" if running else f"{status} · ") + f"{design.sampler} · {self.sweep.jobs} at a time")
        self.header.value = f'<div class="nt-row">{title}{how}</div>'
        show_if(self.start_button, status in ("created", "stopped", "interrupted", "failed"))
        self.start_button.description = "Start" if status == "created" else "Go on"
        show_if(self.stop_button, running)
        show_if(self.arena_button, bool(self._to_compare()))
        shown = self.facts if self._all else self.facts[:FIRST]
        self.show_trials(shown, best, design.metric, running=running, on_stop=self._ask_to_stop)
        self.more_button.description = f"Show all {len(self.facts)}"
        self.meaning.value = self._meaning()
        self._show_parts()

    def _show_parts(self) -> None:
        self.show_parts(live=not self._is_kept, more=not self._all and len(self.facts) > FIRST)

    def _read(self) -> None:
        """Look at every trial; of those that ended, once."""
        events = self.sweep.events()
        began = {event["trial"]: event["time"] for event in events if event["type"] == "start"}
        known = {one.number: one for one in self.facts}
        facts = []
        for trial in self.sweep.trials:
            if self._trials.get(trial.number) == trial and trial.state != "running" and trial.number in known:
                facts.append(known[trial.number])
                continue
            run = self._run(trial)
            facts.append(_trialtable.read(trial, run, self.sweep.design.metric, began.get(trial.number)))
            self._trials[trial.number] = trial
        if not facts and self.sweep.status == "created":
            facts = self.facts or [
                _trialtable.to_come(number, *one) for number, one in enumerate(self.sweep.preview.trials, 1)
            ]
        self.facts = _trialtable.ordered(facts, maximise=self.sweep.design.maximise)

    def _run(self, trial: Trial) -> Run | None:
        if trial.state in ("waiting", "refused"):
            self._runs.pop(trial.number, None)
            return None
        path, known = trial.run_path, self._runs.get(trial.number)
        if path is None:
            return None
        if known is None or known.path != path.resolve():
            self._runs[trial.number] = Run.at(path)
        return self._runs[trial.number]

    def _share_done(self) -> float:
        whole = len(self.facts) + self.sweep.to_come
        shares = [
            one.step / one.total_steps if one.state == "running" and one.total_steps
            else float(one.state not in ("waiting", "running"))
            for one in self.facts
        ]  # fmt: skip
        return sum(shares) / whole if whole else 0.0

    @property
    def _is_kept(self) -> bool:
        """Whether the charts and the table stand in the places that are saved, and need not stand in the card."""
        return self._settled and self._times_shown < 2

    def _draw(self, *, asked: bool, ended: bool) -> None:
        if ended and self.kept and self.sweep.status != "created":
            if asked or not self._settled:
                self._settle()
            if self._is_kept:
                return
        elif self._settled:  # trials were added, or it goes on
            self._clear_kept()
        counts = [(number, len(run.events())) for number, run in self._runs.items()]
        drawn = (counts, [(one.number, one.state, one.value) for one in self.facts if one.counts], self.log_scale.value)
        due = asked or ended or time.monotonic() - self._pushed_at >= PUSH_SECONDS
        if drawn == self._drawn or not due or (self.freeze.value and self._drawn and not ended):
            return
        drawing = self._drawing()
        if not drawing.panels:
            return
        self.draw(sweepcharts.bundle(drawing), drawing.height)
        self._drawn, self._pushed_at = drawn, time.monotonic()
        self.pushes += 1
        self._show_parts()

    def _drawing(self) -> sweepcharts.Drawing:
        best, design = self.best, self.sweep.design
        curves = []
        for one in sorted(self.facts, key=lambda one: one.number):
            if one.number in self._runs:
                told = _trialtable.told(one.params, one.name)
                training, held_out = self._curves(one.number)
                curves.append(sweepcharts.Curve(told, training, held_out, one is best, one.state == "running"))
        measured = [
            sweepcharts.Measured(_hover(one, design.metric), one.params, one.value, one is best)
            for one in self.facts
            if one.counts and one.value is not None
        ]
        return sweepcharts.draw(
            curves, measured, design.space, importance(self._trials.values(), design.metric), design.metric,
            maximise=design.maximise, log=self.log_scale.value,
        )  # fmt: skip

    def _curves(self, number: int) -> tuple[list[Any], list[Any]]:
        events = self._runs[number].events()
        count, known = self._losses.get(number, (-1, ([], [])))
        if count != len(events):
            known = sweepcharts.losses(events)
            self._losses[number] = len(events), known
        return known

    def _meaning(self) -> str:
        """How importance is computed, in words, once it is shown."""
        valued = sum(one.counts for one in self.facts)
        if valued < FEWEST:
            return ""
        hint = f" {valued} trials tell little: take it for a hint." if valued < FEW else ""
        text = (
            f"Importance: the share of the differences in {self.sweep.design.metric} that a setting explains "
            f"by itself, less what chance would (ε², from the means of the trials with each value).{hint}"
        )
        return f'<div class="nt-help" style="margin-top:4px">{escape(text)}</div>'

    def _settle(self) -> None:
        """Put the final charts and the table where they are saved, and fold what is live away."""
        place, table = self.kept
        drawing = self._drawing()
        # A renderer that already drew a figure ignores an update: through html, it is made anew.
        place.update({"text/html": "", "text/plain": ""}, raw=True)
        if drawing.panels:
            place.update(sweepcharts.bundle(drawing), raw=True)
        table.update(self._table_bundle(), raw=True)
        self._settled = True
        if self._is_kept:
            self.draw_nothing()
            self._drawn = ()
        self._refresh()

    def _table_bundle(self) -> dict[str, str]:
        best, metric = self.best, self.sweep.design.metric
        sentence = f"<b>{escape(self.sweep.id)}</b>, {escape(self.sweep.status)}: {escape(self.sweep.sentence())}"
        return {
            "text/html": _trialtable.plain(self.facts, best, metric, sentence)
            + f'<div style="font-size:12px;opacity:.7;margin-left:6px">{self._meaning()}</div>',
            "text/plain": _trialtable.text(self.facts, best, metric),
        }

    def _clear_kept(self) -> None:
        for place, content in zip(self.kept, empty(_WAITING), strict=False):
            place.update(content, raw=True)
        self._settled = False

    def _show_all(self) -> None:
        self._all = True

    def _start(self) -> None:
        self.ask_nothing()
        self.sweep.start()

    def _open_adding(self) -> None:
        best = self.best
        self.adding.open(best.params if best is not None else None, [trial.params for trial in self.sweep.trials])

    def _add(self, points: Sequence[Point]) -> None:
        design = self.sweep.design
        for point in points:
            for repeat in range(design.repeats):
                self.sweep.add(**design.seeded(dict(point), repeat))
        count = len(points) * design.repeats
        # A sweep at its end does not look any more; one that goes on may come to its end before it has seen these.
        self._awaited = len(self.sweep.trials) + count
        self.say(notice(f"{count} trial{'' if count == 1 else 's'} added.", "info"))

    def _ask_to_stop(self, number: int) -> None:
        trial = self.sweep.trial(number)
        if trial.state == "waiting":
            what = "It will not be tried, also not by the next call."
        else:
            what = "It ends after the step in progress. Its adapter is kept; the steps that are left are not done."
        self.ask(f"Stop trial {trial.name}?\n{what}", f"Stop {trial.name}", lambda: self._stop(trial))

    def _stop(self, trial: Trial) -> None:
        self.sweep.stop(trial)
        self._say_until(
            f"Stopping trial {trial.name} after this step …",
            lambda: self.sweep.trial(trial.number).state not in ("waiting", "running"),
        )

    def _ask_to_stop_all(self) -> None:
        what = "What runs ends after its step and keeps its adapter; what waits is left for Go on."
        self.ask(f"Stop the sweep?\n{what}", "Stop all", self._stop_all)

    def _stop_all(self) -> None:
        self._awaited = None
        self.sweep.stop()
        self._say_until("Stopping after this step …", lambda: self.sweep.status != "running")

    def _say_until(self, text: str, is_over: Callable[[], bool]) -> None:
        self._passing = notice(text, "info"), is_over
        self.say(self._passing[0])

    def _to_compare(self) -> list[Facts]:
        return [one for one in self.facts if one.counts][:BEST]

    def _ask_arena(self) -> None:
        if self._worker is None:
            self._worker = Worker(f"nbtune-arena-{self.sweep.id}", self._tell_status, self._arena_failed)
        found = [self.sweep.trial(one.number).run for one in self._to_compare()]
        runs = [run for run in found if run is not None]
        self._worker.ask("arena", "Loading the model …", lambda: self._open_arena(runs))

    def _open_arena(self, runs: Sequence[Run]) -> None:
        from nbtune.compare.arena import arena

        url = arena("base", *runs, runs_dir=self.sweep.path / "runs").url
        names = escape(", ".join(run.name for run in runs))
        link = f'<a href="{url}" target="_blank" rel="noopener">{url}</a>'
        self.told.value = (
            f'<div class="nt-problem nt-info">The base model and {names} answer, side by side, at {link}</div>'
        )

    def _tell_status(self, text: str) -> None:
        if text:
            self.told.layout.display = None
            self.told.value = f'<div class="nt-soft" role="status">{escape(text)}</div>'

    def _arena_failed(self, _: str, error: Exception) -> None:
        text = str(error) if isinstance(error, NbtuneError) else f"{type(error).__name__}\n{error}"
        where = "" if isinstance(error, NbtuneError) else "".join(traceback.format_exception(error))
        self.told.value = notice(text, "error") + _reports.folded("Traceback", where)


def _hover(one: Facts, metric: str) -> str:
    """A trial's settings under each other, for a chart."""
    lines = [f"<b>{one.name}</b>", *(f"{escape(name)} {escape(str(value))}" for name, value in one.params.items())]
    return "<br>".join([*lines, f"{escape(metric)} {one.value:.5g}"]).replace("%{", "{")
