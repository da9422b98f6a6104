"""The wizard: a form in steps that builds a RunSpec, says what it will cost, starts it and shows it.

    wizard = nbtune.wizard(max_steps=20)      # displays it
    wizard.set(learning_rate=1e-4)            # as if typed
    wizard.start_button.click()               # or: run = wizard.start()

Callbacks read fields, mark errors and ask the worker; what takes longer than a click runs on the worker's thread.
"""

from __future__ import annotations

import asyncio
import copy
import traceback
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
from IPython.display import DisplayHandle, display

from nbtune.errors import AdapterError, NbtuneError, RunError
from nbtune.peft.config import LayerConfig, PeftConfig, PeftType
from nbtune.spec import RunSpec
from nbtune_widgets import _cards, live
from nbtune_widgets._frame import STEPS, Frame, machine, set_class
from nbtune_widgets._style import chip
from nbtune_widgets._worker import Worker
from nbtune_widgets.form import Field
from nbtune_widgets.modules import ModulePicker
from nbtune_widgets.specform import FULL, TARGETS, SpecForm, config

if TYPE_CHECKING:
    from nbtune.check import Problem
    from nbtune.infer.arena import Arena
    from nbtune.run import Run

DATA, REVIEW = STEPS.index("Data"), STEPS.index("Review")
# Where configs of a family are (nbtune.peft.configs), and what the form calls it.
_FAMILIES = {
    "lora": "LoRA", "low_rank": "Low rank", "vectors": "Vectors", "rotations": "Rotations",
    "shared": "Shared matrices", "sparse": "Sparse", "prompts": "Prompts", FULL: "Full",
}  # fmt: skip
_NO_MAP = (PeftType.LN_TUNING, PeftType.TRAINABLE_TOKENS)  # norms and embeddings; the map has linear layers
_STEP_OF = {"model": 0, "data": 1, "method": 2, "training": 3, "tracking": 3}


class Wizard:
    """The form and its run. `spec` is what the form says now, `fields` its fields by the path of the setting.

    Args:
        start_with: Settings by name, as in `RunSpec.updated`, or whole parts (`model=...`, `data=...`, `method=...`).
    """

    def __init__(self, **start_with: Any) -> None:
        self.run: Run | None = None
        self.view: live.LiveView | None = None
        self.arena: Arena | None = None
        self.error: str | None = None  # the traceback of the last thing that went wrong
        self._skeleton: Any = None  # the chosen model without weights
        self._refused: dict[str, str] = {}  # settings that do not suit the model, and why
        self._data_is_stale = True
        self._failures: dict[str, str] = {}
        self._places: list[DisplayHandle] = []
        self.form = SpecForm(self._changed)
        self.picker = ModulePicker(self._picked)
        self._model_card, self._data_card, self._code = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self._problems = widgets.VBox()
        self.frame = Frame(self._pages(), self._guarded)
        self.frame.on_go = self.go
        self.start_button = self.frame.start
        self.start_button.on_click(self._guarded(lambda: self._worker.ask("start", "Starting …", self.start)))
        self.compare_button = self.frame.button(
            "Compare", lambda: self._worker.ask("compare", "Opening the chat …", self.compare),
            "Chat with the base model and the adapter, side by side")  # fmt: skip
        self.compare_button.add_class("nt-primary")
        self.chat = widgets.HTML()
        self._worker = Worker("nbtune-wizard", self.frame.say, self._failed)
        if start_with:
            self.form.set(**start_with)
        self.choose_method(self.form.method)
        self.go(0)
        self._worker.ask("machine", "Looking at this machine …", self._look_at_machine)
        self._react("model")

    @property
    def widget(self) -> widgets.Box:
        return self.frame.widget

    @property
    def fields(self) -> dict[str, Field]:
        """Every field of the form with the chosen method: `wizard.fields["training.max_steps"].value = 8`."""
        return self.form.fields

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

    def choose_method(self, name: str) -> None:
        """As a click on a method's card: `LORA`, `full`, ..."""
        self.form.method = name
        for kind, button in self.methods.items():
            set_class(button, "nt-on", on=kind == name)
        self.families.value = _family(name)
        group = self.form.method_group
        self._method_fields.children = [group.widget] if group is not None else []
        targets = [self.fields[TARGETS].widget] if TARGETS in self.fields else []
        self.picker.map.layout.display = None if targets and name not in _NO_MAP else "none"
        self._modules.children = [self.picker.widget, *targets]
        self._modules.layout.display = "none" if name == FULL else None
        self._react("method")

    def go(self, step: int) -> None:
        """Show a step, 0 to 4."""
        self.frame.go(step)
        self._mark_steps()
        self._read_what_is_shown()

    def start(self) -> Run:
        """Start the run that the form describes and show it. Raises NbtuneError where it cannot be started."""
        from nbtune.run import train

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
        if self.view is not None:
            self.view.close()
        self.run = run
        self.view = live.LiveView(run)
        self.view.keep_in(self._places)
        self.view.when_ended = self._ended
        self.compare_button.layout.display = "none"
        self.chat.value = ""
        after = widgets.HBox([self.compare_button, self.chat], layout=widgets.Layout(align_items="center"))
        self.frame.show_run(self.view.widget, after)
        self.view.start()

    def compare(self) -> Arena:
        """Open the chat that answers with the base model and with the run's adapter, side by side."""
        from nbtune.infer.arena import arena

        if self.run is None:
            raise RunError("There is no run to compare", "", "Press Start first.")
        self.arena = opened = arena("base", self.run)
        link = f'<a href="{opened.url}" target="_blank" rel="noopener">{opened.url}</a>'
        both = f"The base model and {escape(live.short_name(self.run))} answer, side by side, at {link}"
        self.chat.value = f'<div class="nt-problem nt-info">{both}</div>'
        self._fine("compare")
        return opened

    def wait(self, timeout: float | None = None) -> None:
        """Block until the background work (reading, planning, starting; not the run) is done."""
        self._worker.wait(timeout)

    def close(self) -> None:
        """Give the widgets back. A run goes on."""
        self._worker.close()
        if self.view is not None:
            self.view.close()
        live.dispose(self.widget, self.compare_button, self.chat, *self.methods.values(), *self.form.widgets)

    def _ipython_display_(self) -> None:
        display(self.widget)
        self._places = live.places("")
        if self.view is not None:
            self.view.keep_in(self._places)

    def _pages(self) -> list[widgets.DOMWidget]:
        groups = self.form.groups
        tracking = widgets.HTML('<div class="nt-heading">Tracking</div>', layout=widgets.Layout(margin="8px 0 0"))
        return [
            widgets.VBox([groups["model"].widget, self._model_card]),
            widgets.VBox([groups["data"].widget, self._data_card]),
            self._method_page(),
            widgets.VBox([groups["training"].widget, tracking, groups["tracking"].widget]),
            self._review_page(),
        ]

    def _method_page(self) -> widgets.DOMWidget:
        look = {"layout": widgets.Layout(), "style": widgets.ButtonStyle()}  # one for all, as in form.Look
        self.methods = {str(kind): widgets.Button(description=_card(kind), **look) for kind in (*PeftType, FULL)}
        for kind, button in self.methods.items():
            button.add_class("nt-method")
            button.on_click(self._guarded(lambda kind=kind: self.choose_method(kind)))
        families = [(label, family) for family, label in _FAMILIES.items()]
        self.families = widgets.ToggleButtons(options=families, style={"button_width": "auto"})
        self.families.add_class("nt-tabs")
        self._cards = widgets.HBox(layout=widgets.Layout(flex_flow="row wrap", margin="8px 0 0"))
        self.families.observe(self._guarded(self._show_family), names="value")
        self._show_family()
        self._method_fields = widgets.VBox()
        heading = widgets.HTML('<div class="nt-heading">Method</div>')
        left = widgets.VBox(
            [heading, self.families, self._cards, self._method_fields],
            layout=widgets.Layout(flex="1 1 330px", min_width="0"),
        )
        self._modules = widgets.VBox(layout=widgets.Layout(flex="2 1 420px", min_width="0"))
        page = widgets.HBox([left, self._modules], layout=widgets.Layout(flex_flow="row wrap"))
        page.add_class("nt-columns")
        return page

    def _show_family(self) -> None:
        cards = self.methods.items()
        self._cards.children = [button for kind, button in cards if _family(kind) == self.families.value]

    def _review_page(self) -> widgets.DOMWidget:
        self.echo = widgets.ToggleButtons(options=["Python", "YAML", "command"], style={"button_width": "auto"})
        self.echo.add_class("nt-tabs")
        show = self._guarded(self._show_code)
        self.echo.observe(show, names="value")
        heading = widgets.HTML('<div class="nt-heading">The same run as code</div>')
        return widgets.VBox([self._problems, heading, self.echo, self._code])

    def _guarded(self, act: Callable[[], Any]) -> Callable[[Any], None]:
        """A callback whose error is shown and kept: the kernel would print it where nobody looks."""

        def callback(_: Any) -> None:
            try:
                act()
            except Exception as error:  # noqa: BLE001 - see above
                self._failed("click", error)

        return callback

    def _changed(self, part: str, name: str) -> None:
        """A field has another value."""
        if name == "max_length" or part in ("model", "data"):
            self._data_is_stale = True
        for key in ("click", "check", "start"):
            self._fine(key)
        self._react(part)
        self._mark_steps()
        self._read_what_is_shown()

    def _picked(self, kinds: list[str], layers: list[int] | None) -> None:
        """The map was clicked: the fields say so, and everything follows from them."""
        # Layers first away: beside a regular expression PEFT does not take them.
        self.fields["method.layers_to_transform"].value = layers
        self.fields[TARGETS].value = kinds

    def _react(self, part: str) -> None:
        """Have the worker read again what depends on a part."""
        if part == "model":
            self._worker.ask("model", "Reading the model …", self._read_model)
        elif part == "method":
            self._worker.ask("modules", "Counting …", self._mark_modules)
        if part != "tracking":
            self._worker.ask("plan", "Planning …", self._plan)

    def _read_what_is_shown(self) -> None:
        if self.frame.step == DATA and self._data_is_stale:
            self._worker.ask("data", "Reading the data …", self._read_data)
        if self.frame.step == REVIEW:
            self._worker.ask("check", "Checking …", self._check)

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
        self.frame.machine.value = chip(machine())

    def _read_model(self) -> None:
        from nbtune.models import describe, skeleton

        self._skeleton = None
        self._model_card.value = ""
        spec = self.form.model
        info = describe(spec, on_status=self.frame.say)
        self._skeleton = skeleton(spec)
        self._model_card.value = _cards.model(info)
        self.picker.show(info)
        self._fine("model")
        self._mark_modules()

    def _mark_modules(self) -> None:
        """Give the skeleton the adapter: what it adapts and trains, or which setting does not suit the model."""
        from nbtune.models import attach_adapter
        from nbtune.peft.targets import find_targets

        if self._skeleton is None or self.form.method == FULL:
            return
        for path, reason in self._refused.items():
            if path in self.fields and self.fields[path].error == reason:
                self.fields[path].mark("")
        self._refused.clear()
        try:
            method = PeftConfig.from_dict({"peft_type": self.form.method, **self.form.values("method")})
            paths = find_targets(self._skeleton, method) if isinstance(method, LayerConfig) else []
            adapted = attach_adapter(copy.deepcopy(self._skeleton), RunSpec(model=self.form.model, method=method))
        except NbtuneError as error:
            self.picker.refuse(error.title)
            if isinstance(error, AdapterError):
                self._refuse(error)
        else:
            self.picker.mark(paths, sum(p.numel() for p in adapted.parameters() if p.requires_grad))
            self._fine("modules")
        if self.form.method_group is not None:
            self.form.method_group.refresh()  # what is wrong must be seen
        self._mark_steps()

    def _refuse(self, error: AdapterError) -> None:
        """Say an error of the method at the field that it is about."""
        from nbtune.check import setting_of

        path = setting_of(f"{error.title} {error.message}", config(self.form.method))
        if path is not None:
            reason = " ".join(part for part in (error.message or error.title, error.remedy) if part)
            self._refused[path] = reason
            self.fields[path].mark(reason)

    def _read_data(self) -> None:
        from nbtune.data import encode, read_rows
        from nbtune.models import load_tokenizer

        self._data_is_stale = False
        self._data_card.value = ""
        spec = self.spec
        rows = read_rows(spec.data, on_status=self.frame.say)
        tokenizer = load_tokenizer(spec.model)
        example = encode(rows.train[0], tokenizer)[0]
        self._data_card.value = _cards.data(rows, example, tokenizer, spec.training.max_length)
        self._fine("data")

    def _plan(self) -> None:
        from nbtune.plan import plan

        self.frame.plan.value = self.frame.sums.value = ""
        spec = self.spec
        self._show_code()
        planned = plan(spec)
        self.frame.plan.value, self.frame.sums.value = _cards.plan(planned), _cards.sums(planned, spec)
        self._fine("plan")
        self._mark_steps()

    def _check(self) -> None:
        from nbtune.check import check
        from nbtune.run import default_runs_dir

        self._problems.children = []
        problems = check(self.spec, runs_dir=default_runs_dir())
        good = '<div class="nt-problem nt-good"><span class="nt-b">Nothing stands in the way.</span></div>'
        self._problems.children = [self._problem(found) for found in problems] or [widgets.HTML(good)]
        self._fine("check")

    def _problem(self, found: Problem) -> widgets.DOMWidget:
        """A problem, with a button that leads to the setting it is about."""
        text = widgets.HTML(_cards.problem(found), layout=widgets.Layout(flex="1 1 auto"))
        if found.setting not in self.fields:
            return text
        setting = self.fields[found.setting].setting
        lead = self.frame.button(f"Change {setting.label.lower()}", lambda: self.go(_STEP_OF[setting.part]))
        return widgets.HBox([text, lead], layout=widgets.Layout(align_items="center"))

    def _show_code(self) -> None:
        spec = self.spec
        shown = str(self.echo.value)
        text = _cards.python(spec) if shown == "Python" else spec.to_yaml()
        if shown == "command":
            text = f"cat > spec.yaml <<'END'\n{text}END\nnbtune train spec.yaml"
        self._code.value = _cards.pre(text)

    def _ended(self, ended: bool) -> None:
        """Told by the view, on its thread, at every look."""
        self.compare_button.layout.display = None if ended else "none"


def _card(kind: str) -> str:
    """A method in two lines: its name, and the first words of its class's docstring."""
    if kind == FULL:
        return "Full\nEvery weight is trained"
    words = (type(config(kind)).__doc__ or "").partition("(")[0].partition(";")[0].strip(" .")
    return f"{PeftType(kind).label}\n{words}"


def _family(kind: str) -> str:
    return FULL if kind == FULL else PeftType(kind).family


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
    return _shown
