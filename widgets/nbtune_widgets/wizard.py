"""The wizard: a form in steps that builds a RunSpec, says what it will cost, starts it and shows it.

    wizard = nbtune.wizard(max_steps=20)      # displays it
    wizard.set(learning_rate=1e-4)            # as if typed
    wizard.start_button.click()               # or: run = wizard.start()

Callbacks read fields, mark errors and ask the worker; what takes longer than a click runs on the worker's thread.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
from IPython.display import DisplayHandle, display

from nbtune.errors import NbtuneError, RunError
from nbtune.spec import RunSpec
from nbtune_widgets import _cards, live
from nbtune_widgets._frame import STEPS, Frame, machine
from nbtune_widgets._page import Host, Page
from nbtune_widgets._style import chip
from nbtune_widgets._worker import Worker
from nbtune_widgets.data import DataPage
from nbtune_widgets.form import Field
from nbtune_widgets.leaderboard import Leaderboard
from nbtune_widgets.method import MethodPage
from nbtune_widgets.model import ModelPage
from nbtune_widgets.modules import ModulePicker
from nbtune_widgets.review import ReviewPage
from nbtune_widgets.specform import SpecForm
from nbtune_widgets.sweeppage import SweepPage
from nbtune_widgets.training import TrainingPage

if TYPE_CHECKING:
    from nbtune.run import Run
    from nbtune.sweep.sweep import Sweep

_STEP_OF = {"model": 0, "data": 1, "method": 2, "training": 3, "tracking": 3}
_SAYS = (
    "Planning the precisions …",
    "Reading the data …",
    "",
    "",
    "Checking …",
    "Planning the trials …",
)  # while a page is read again
RECENT = 5  # models of the last runs that are offered


class Wizard:
    """The form and its run. `spec` is what the form says now, `fields` its fields by the path of the setting.

    Args:
        start_with: Settings by name, as in `RunSpec.updated`, or whole parts (`model=...`, `data=...`, `method=...`).
    """

    def __init__(self, **start_with: Any) -> None:
        self.run: Run | None = None
        self.sweep: Sweep | None = None  # the one that was run from here
        self.view: live.LiveView | None = None
        self.board: Leaderboard | None = None
        self.error: str | None = None  # the traceback of the last thing that went wrong
        self._failures: dict[str, str] = {}
        self._places: list[DisplayHandle] = []
        self._stale = set(range(len(STEPS)))  # pages to read again when they are shown
        self._planned: int | None = None  # the peak that the last plan came to, in bytes
        self._touched: set[str] | None = None  # while many fields are filled in at once: the parts that changed
        self.form = SpecForm(self._changed)
        host = Host(self._guarded, self._button, self.change, self._lead, self._say, self._ask)
        self.model_page = ModelPage(self.form, host)
        self.data_page = DataPage(self.form, host)
        self.method_page = MethodPage(self.form, host, lambda: self._changed("method", ""))
        self.training_page = TrainingPage(self.form, host)
        self.review_page = ReviewPage(self.form, host)
        self.sweep_page = SweepPage(self.form, host, self.attach_sweep)
        self.pages: tuple[Page, ...] = (
            self.model_page, self.data_page, self.method_page, self.training_page, self.review_page,
            self.sweep_page,
        )  # fmt: skip
        self.frame = Frame([page.widget for page in self.pages], self._guarded)
        self.frame.on_go = self.go
        self.start_button = self.frame.start
        self.start_button.on_click(self._guarded(lambda: self._ask("start", "Starting …", self.start)))
        self._worker = Worker("nbtune-wizard", self.frame.say, self._failed)
        if start_with:
            self.form.set(**start_with)
        self.choose_method(self.form.method)
        self.go(0)
        self._ask("machine", "Looking at this machine …", self._look_at_machine)
        self._react("model")

    @property
    def widget(self) -> widgets.Box:
        return self.frame.widget

    @property
    def fields(self) -> dict[str, Field]:
        """Every field of the form with the chosen method: `wizard.fields["training.max_steps"].value = 8`."""
        return self.form.fields

    @property
    def picker(self) -> ModulePicker:
        return self.method_page.picker

    @property
    def spec(self) -> RunSpec:
        """What the form says. Raises FormError where a field cannot be read or they do not fit each other."""
        return self.form.spec

    def set(self, **changes: Any) -> None:
        """Fill in settings by name (`max_steps=8`, `"training.seed"`) or whole parts (`data=rows`, `method="full"`).

        Raises SpecError for an unknown name or a value that is not allowed, and changes nothing then.
        """
        self.form.set(**changes)
        self.choose_method(self.form.method)

    def change(self, changes: Mapping[str, Any], why: str) -> None:
        """Change settings by path, say from what to what, and offer to undo it.

        Raises SpecError, and changes nothing, where they do not fit the others.
        """
        before = self.spec
        after = before.updated(**changes)
        self._load(after)
        self.frame.tell(_cards.changed(why, _cards.differences(before, after)))
        self.frame.on_undo = lambda: self._load(before)

    def choose_method(self, name: str) -> None:
        """As a click on a method's card: `LORA`, `full`, ..."""
        self.method_page.choose(name)

    def go(self, step: int) -> None:
        """Show a step, 0 to 5."""
        self.frame.go(step)
        self._mark_steps()
        self._read_what_is_shown()

    def start(self) -> Run:
        """Start the run that the form describes and show it. Raises NbtuneError where it cannot be started."""
        from nbtune.run import train

        self._worker.forget()  # nobody looks at the form now
        # Two threads that import from transformers for the first time find it half made ("cannot import AutoConfig").
        self._worker.wait()
        if self.run is not None and self.run.status == "running":
            raise RunError(f"{self.run.id} is still running", "", "Stop it before you start another.")
        run = train(self.spec)
        self.attach(run)
        self._fine("start")
        return run

    async def start_async(self) -> Run:
        """Start, and await the end with the charts moving; raises what the run raised. For a cell under papermill."""
        run = await asyncio.to_thread(self.start)
        assert self.view is not None
        await self.view.pump_async()
        return run.wait()

    def attach(self, run: Run) -> None:
        """Show a run that exists already, in place of the form."""
        self._close_shown()
        self.run = run
        self.view = live.LiveView(run, after=True, vary=self._vary)
        self.view.keep_in(self._places)
        self.frame.show_run(self.view.widget)
        self.view.start()

    def attach_sweep(self, sweep: Sweep) -> None:
        """Show the leaderboard of a sweep, in place of the form."""
        self._worker.forget()  # nobody looks at the form now
        self._close_shown()
        self.sweep, self.board = sweep, Leaderboard(sweep)
        self.board.keep_in(self._places)
        self.frame.show_run(self.board.widget)
        self.board.start()

    def _close_shown(self) -> None:
        for shown in (self.view, self.board):
            if shown is not None:
                shown.close()
        self.view = self.board = None

    def wait(self, timeout: float | None = None) -> None:
        """Block until the background work (reading, planning, starting; not the run) is done."""
        self._worker.wait(timeout)

    def close(self) -> None:
        """Give the widgets back. A run goes on."""
        self._worker.close()
        self._close_shown()
        cards = (*self.method_page.methods.values(), *self.method_page.recipes.values())
        live.dispose(self.widget, *cards, *self.form.widgets, *self.sweep_page.looks)

    def _ipython_display_(self) -> None:
        display(self.widget)
        self._places = live.places("")
        for shown in (self.view, self.board):
            if shown is not None:
                shown.keep_in(self._places)

    def _guarded(self, act: Callable[[], Any]) -> Callable[[Any], None]:
        """A callback whose error is shown and kept: the kernel would print it where nobody looks."""

        def callback(_: Any) -> None:
            try:
                act()
            except Exception as error:  # noqa: BLE001 - see above
                self._failed("click", error)

        return callback

    def _button(self, text: str, act: Callable[[], Any], tooltip: str = "") -> widgets.Button:
        button = widgets.Button(description=text, tooltip=tooltip or None)
        button.on_click(self._guarded(act))
        return button

    def _ask(self, key: str, status: str, work: Callable[[], Any], *, idle: bool = False) -> None:
        self._worker.ask(key, status, work, idle=idle)

    def _say(self, text: str) -> None:
        self.frame.say(text)

    def _lead(self, path: str) -> None:
        self.go(_STEP_OF[path.split(".", 1)[0]])

    def _vary(self, spec: RunSpec) -> None:
        """Bring the form back with the settings of a run."""
        self._load(spec)
        self.go(_STEP_OF["method"])

    def _load(self, spec: RunSpec) -> None:
        """Fill in every field, and react once."""
        touched = self._touched = set()
        try:
            self.form.load(spec)
            self.choose_method(self.form.method)
        finally:
            self._touched = None
        for part in touched:
            self._changed(part, "")

    def _changed(self, part: str, _: str) -> None:
        """A field has another value."""
        if self._touched is not None:
            self._touched.add(part)
            return
        self.frame.tell("")  # what was told is no longer all
        self._stale = set(range(len(STEPS)))
        for key in ("click", "page", "start"):
            self._fine(key)
        self._react(part)
        self.method_page.mark_cards()
        self._mark_steps()
        self._read_what_is_shown()

    def _react(self, part: str) -> None:
        """Have the worker read again what depends on a part."""
        if self._touched is not None:
            self._touched.add(part)
            return
        if part == "model":
            self._ask("model", "Reading the model …", self._read_model)
        elif part in ("method", "training"):
            self._ask("modules", "Counting …", self._count)
        if part != "tracking":
            # On the Data step the rows come first: they are looked at, and planning takes seconds.
            self._ask("plan", "Planning …", self._plan, idle=STEPS[self.frame.step] == "Data")

    def _read_what_is_shown(self) -> None:
        step = self.frame.step
        if step in self._stale:
            self._ask("page", _SAYS[step], lambda: self._refresh(step))

    def _refresh(self, step: int) -> None:
        self._stale.discard(step)
        try:
            self.pages[step].refresh(self.spec)
        except NbtuneError:
            self._stale.add(step)
            raise
        self._fine("page")

    def _mark_steps(self) -> None:
        self.frame.mark({_STEP_OF[field.setting.part] for field in self.fields.values() if field.error})

    def _failed(self, key: str, error: Exception) -> None:
        """Keep an error and show it until the same work goes well."""
        self.error = "".join(traceback.format_exception(error))
        text = str(error) if isinstance(error, NbtuneError) else f"{type(error).__name__}\n{error}"
        self._failures[key] = text
        self.frame.complain(dict.fromkeys(self._failures.values()))
        self._mark_steps()

    def _fine(self, key: str) -> None:
        if self._failures.pop(key, None) is not None:
            self.frame.complain(dict.fromkeys(self._failures.values()))

    def _look_at_machine(self) -> None:
        from nbtune.models import known_models
        from nbtune.run import runs

        self.frame.machine.value = chip(machine())
        trained = dict.fromkeys(run.spec.model.name for run in runs())
        self.model_page.offer(known_models(Path()), list(trained)[:RECENT])

    def _read_model(self) -> None:
        from nbtune.models import describe, skeleton

        self.method_page.show(None, None)
        self.model_page.show(None)
        spec = self.form.model
        info = describe(spec, on_status=self.frame.say)
        self.method_page.show(info, skeleton(spec))
        self.model_page.show(info)
        self._fine("model")
        self._count()
        self._stale.add(0)
        self._read_what_is_shown()

    def _count(self) -> None:
        self.method_page.count()
        self._fine("modules")
        self._mark_steps()

    def _plan(self) -> None:
        from nbtune.plan import plan

        self.frame.plan.value = self.frame.sums.value = ""
        spec = self.spec
        planned = plan(spec)
        self.frame.plan.value = _cards.plan(planned)
        self.frame.sums.value = _cards.sums(planned, spec, self._planned)
        self._planned = planned.peak_bytes
        self._fine("plan")
        self._mark_steps()


_shown: Wizard | None = None  # the one on the screen: a cell that is run again must not leave its widgets behind


def wizard(**start_with: Any) -> Wizard:
    """Display the wizard in this cell. One that was shown before is closed; its run goes on, and is shown here."""
    global _shown
    former, _shown = _shown, Wizard(**start_with)
    display(_shown)
    if former is not None:
        former.close()
        if former.run is not None and former.run.status == "running":
            _shown.attach(former.run)
        elif former.sweep is not None and former.sweep.status == "running":
            _shown.attach_sweep(former.sweep)
    return _shown
