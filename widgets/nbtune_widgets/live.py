"""The live view of a run: progress, charts, Pause, Stop and Resume, and what stays in the notebook when it ends.

    view = LiveView(run)
    view.show(); view.pump()          # blocks; papermill, Colab, a cell that should end with the run
    view.show(); view.start()         # returns; a daemon thread draws, the Stop button works, other cells run
    view.show(); await view.pump_async()   # blocks the cell, yet the Stop button works (ipykernel >= 7.4)

Whoever drives is the only one that writes to the widgets: see `_driver.py`. The charts are assigned to
`Output.outputs`, which the screen follows; what is kept in the notebook goes through a display handle, which the saved
file follows. Widget state itself is not saved by JupyterLab.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, Protocol

import ipywidgets as widgets
from IPython.display import DisplayHandle, display

from nbtune.errors import NbtuneError
from nbtune.spec import RunSpec
from nbtune_widgets import _reports, _summary, charts
from nbtune_widgets._after import After
from nbtune_widgets._board import Board, show_if
from nbtune_widgets._driver import Driver
from nbtune_widgets._style import duration, notice

LIVE = ("created", "running", "paused")  # the status of a run that has not ended
LOG_LINES = 14
PUSH_SECONDS = 0.9  # a push redraws the charts and loses a zoom, so it comes at most this often


class Progress(Protocol):
    @property
    def step(self) -> int: ...
    @property
    def total_steps(self) -> int | None: ...  # None until the data is read
    @property
    def eta_seconds(self) -> float | None: ...
    @property
    def tokens_per_second(self) -> float | None: ...
    @property
    def message(self) -> str: ...


class LiveRun(Protocol):
    """What a view needs of a run."""

    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def spec(self) -> RunSpec: ...
    @property
    def status(self) -> str: ...
    @property
    def error(self) -> str | None: ...
    @property
    def traceback(self) -> str | None: ...
    @property
    def kept_step(self) -> int | None: ...
    def events(self) -> list[dict[str, Any]]: ...
    def progress(self) -> Progress: ...
    def log_tail(self, lines: int, /) -> str: ...
    def summary(self) -> dict[str, Any]: ...
    def stop(self) -> Any: ...
    def pause(self) -> Any: ...
    def resume(self) -> Any: ...


def alive(run: LiveRun) -> bool:
    return run.status in LIVE


def short_name(run: LiveRun) -> str:
    """What a person calls the run: its label, or the part of its id that can be remembered."""
    return run.name


def progress_line(progress: Progress) -> str:
    """As in `step 60 of 100 · 812 tokens/s · 48 s left`; before the first step, what is being done."""
    if not progress.step:
        return progress.message or "starting"
    parts = [_steps(progress)]
    if progress.tokens_per_second:
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    if progress.eta_seconds:
        parts.append(f"{duration(progress.eta_seconds)} left")
    return " · ".join(parts)


def done(progress: Progress) -> float:
    """The share of the steps that is done, 0 to 1."""
    return progress.step / progress.total_steps if progress.total_steps else 0.0


def _steps(progress: Progress) -> str:
    return f"step {progress.step} of {progress.total_steps or '?'}"


class LiveView(Board, Driver):
    """Shows one run. `widget` is the box to place; `show()` displays it in the current cell, with room for the result.

    Args:
        run: The run; see `LiveRun` for what is asked of it.
        interval: Seconds between two looks at the run.
        after: Whether an ended run can be chatted with and varied from here.
        vary: Shows a form with the settings of the run; None opens one below it.
    """

    def __init__(
        self,
        run: LiveRun,
        interval: float = 1.0,
        *,
        after: bool = False,
        vary: Callable[[RunSpec], None] | None = None,
    ) -> None:
        Board.__init__(self, run.name, run.id, _summary.title(run.spec))
        Driver.__init__(self, f"nbtune-view-{run.id}", "run", interval)
        self.run = run
        self.pushes = 0
        self.kept: list[DisplayHandle] = []  # the two places where the finished charts and the table stay
        self._drawn: tuple[Any, ...] = ()
        self._pushed_at = 0.0
        self._settled = False
        self._times_shown = 0
        self._note = ("", "", "")  # status when it was said, text, kind
        self.after = After(run, vary) if after else None
        if self.after is not None:
            self.widget.children = (*self.widget.children, self.after.widget)
        self.pause_button.on_click(lambda _: self._tell("pause"))
        self.stop_button.on_click(lambda _: self._tell("stop"))
        self.resume_button.on_click(lambda _: self._tell("resume"))
        self.on_look(lambda: self._tell("look"))
        self.widget._view_count = 0  # asks the front end to count
        self.widget.observe(self._seen, names="_view_count")
        self._refresh()

    def show(self) -> None:
        """Display the view in this cell, and under it two plain outputs that become the final charts and the table."""
        display(self.widget)
        self.kept = places(self._waiting)
        self._settled = False

    def keep_in(self, kept: list[DisplayHandle]) -> None:
        """Use places, made by `places`, of another cell."""
        self.kept = kept
        self._clear_kept()

    def _clear_kept(self) -> None:
        for place, content in zip(self.kept, empty(self._waiting), strict=False):
            place.update(content, raw=True)
        self._settled = False

    @property
    def _waiting(self) -> str:
        return f"{short_name(self.run)}: the finished charts will be kept here."

    def _ipython_display_(self) -> None:
        self.show()

    def close(self) -> None:
        """Stop drawing and give the widgets back. The run goes on; what was kept in the notebook stays."""
        self._take_over()
        if self.after is not None:
            self.after.close()
        dispose(self.widget)

    def _interrupted(self) -> None:
        self._tell("stop")

    def _seen(self, change: dict[str, Any]) -> None:
        """The card was drawn, or removed. Drawn again, after a reload of the page say, its kept places are lost."""
        if change["new"] > change["old"]:
            self._times_shown += 1
            if self._times_shown > 1:
                self._tell("draw again")

    def _step(self) -> bool:
        """Obey, draw, and say whether the run has ended."""
        asked = False
        while not self._commands.empty():
            self._obey(self._commands.get())
            asked = True
        ended = not alive(self.run)  # read before the events, so that an end seen here has all its events below
        self._refresh()
        self._draw(asked, ended)
        return ended

    def _obey(self, command: str) -> None:
        status = self.run.status
        try:
            if command == "stop" and alive(self.run):
                self.run.stop()
                self._note = (status, "Stopping after this step …", "info")
            elif command == "pause" and status == "running":
                self.run.pause()
                self._note = (status, "Pausing after this step …", "info")
            elif command == "resume" and status != "running":
                self.run.resume()
            elif command == "draw again":  # a page that has just opened may have missed the charts
                self.charts.outputs, self._drawn = (), ()
        except NbtuneError as error:
            self._note = (status, str(error), "error")

    def _refresh(self) -> None:
        """Everything but the charts. Setting a trait to what it is sends nothing, so this costs little."""
        status, progress = self.run.status, self.run.progress()
        running = status in ("created", "running")
        text = progress_line(progress) if running else f"{status} · {_steps(progress)}"
        self.status.value = f'<span class="nt-soft" style="margin:0 12px;white-space:nowrap">{escape(text)}</span>'
        self.bar.value = done(progress)
        show_if(self.pause_button, running)
        show_if(self.stop_button, alive(self.run))
        show_if(self.freeze, alive(self.run))
        show_if(self.resume_button, status in ("paused", "stopped", "failed", "interrupted"))
        self.say(self._news(status))
        self._unfold()
        if self.after is not None:
            self.after.offer(not alive(self.run))

    def _unfold(self) -> None:
        events = self.run.events()
        count = _reports.count_samples(events)
        show_if(self.folds["samples"].toggle, bool(count))
        self.folds["samples"].show(str(count), lambda: _reports.samples(events))
        warnings = sum(event["type"] == "warning" for event in events)
        told = f"{warnings} warning{'s' if warnings > 1 else ''}" if warnings else ""
        self.folds["log"].show(told, lambda: _pre(self.run.log_tail(LOG_LINES) or "nothing yet"))
        self.folds["spec"].show("", lambda: _pre(self.run.spec.to_yaml()))

    def _news(self, status: str) -> str:
        """What to say under the bar: the answer to a button while the status is as it was then, else the status."""
        said_at, text, kind = self._note
        if said_at == status:
            return notice(text, kind)
        self._note = ("", "", "")
        if status == "failed":
            return _reports.failure(self.run) or notice("The run failed.\nThe reason is in its log.", "error")
        if status == "interrupted":
            return notice(f"The run was interrupted: its process ended.\n{_reports.kept(self.run)}")
        return ""

    def _draw(self, asked: bool, ended: bool) -> None:
        if ended and self.kept:
            if asked or not self._settled:
                self._settle()
            if self._times_shown < 2:
                return
        elif self._settled:  # resumed, by the button or by code
            self._clear_kept()
        events = self.run.events()
        drawn = (len(events), events[-1].get("time") if events else None, self.view)
        due = asked or ended or time.monotonic() - self._pushed_at >= PUSH_SECONDS
        if drawn == self._drawn or not due or not any(event["type"] in ("train", "eval") for event in events):
            return
        if self.freeze.value and self._drawn and not ended:
            return
        data = charts.bundle(events, self.view)
        self.charts.layout.min_height = (
            f"{charts.HEIGHT + 4}px"  # the old chart goes as the new one comes: hold the place
        )
        self.charts.outputs = ({"output_type": "display_data", "data": data, "metadata": {}},)
        self._drawn, self._pushed_at = drawn, time.monotonic()
        self.pushes += 1

    def _settle(self) -> None:
        """Put the final charts and the table where they are saved, and fold the live charts away."""
        place, table = self.kept
        # A renderer that already drew a figure ignores an update: through html, it is made anew.
        place.update({"text/html": "", "text/plain": ""}, raw=True)
        place.update(charts.bundle(self.run.events(), self.view), raw=True)
        table.update(_summary.bundle(self.run), raw=True)
        self._settled = True
        if self._times_shown < 2:
            self.charts.layout.min_height = "0"
            self.charts.outputs = ()
            self._drawn = ()


def _pre(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def places(text: str) -> list[DisplayHandle]:
    """Display, in this cell, the two plain outputs that become the final charts and the table of a run."""
    return [handle for place in empty(text) if (handle := display(place, raw=True, display_id=True))]


def empty(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """What stands in the two places while a run goes on: html, never a figure beside the live one."""
    quiet = f'<div style="opacity:.55;font-size:12px;margin:2px 6px">{escape(text)}</div>' if text else ""
    return {"text/html": quiet, "text/plain": text}, {"text/html": "", "text/plain": ""}


def dispose(*boxes: widgets.Widget) -> None:
    """Close widgets with all that is in them, their layouts and styles too: ipywidgets keeps what is not closed."""
    for box in boxes:
        if isinstance(box, widgets.Box):
            dispose(*box.children)
        parts = [value for value in box.trait_values().values() if isinstance(value, widgets.Layout | widgets.Style)]
        for part in (*parts, box):
            part.close()
