"""The Sweep step: lists and ranges for the settings of the form, the trials that follow from them, and their start.

Each trial is the notebook that the wizard writes of this run, executed once; see `nbtune.sweep`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ipywidgets as widgets
from pydantic import BaseModel, Field

from nbtune import echo
from nbtune.errors import NbtuneError
from nbtune.plan import format_bytes, format_seconds
from nbtune.spec import RunSpec, Setting, model_settings
from nbtune.sweep.design import Design
from nbtune.sweep.halving import Halving
from nbtune.sweep.notebook import SweepNotebook
from nbtune.sweep.preview import Preview, show
from nbtune.sweep.space import Range, Space
from nbtune.sweep.sweep import Sweep, sweep
from nbtune.sweep.together import Together
from nbtune_widgets import _runtable, form
from nbtune_widgets._adding import read
from nbtune_widgets._page import Host, replace
from nbtune_widgets._style import notice
from nbtune_widgets.specform import FormError, SpecForm

if TYPE_CHECKING:
    from nbtune.sweep.preview import Forecaster

SHOWN = 24  # trials of the preview
_HINT = (
    "Give a setting several values with commas, or a range with how many: 4, 8, 16 or 1e-5..1e-3 log 3. "
    "What is left empty stays as the form has it."
)


def _option(default: Any, help: str, label: str, *, unit: str = "", advanced: bool = False, **limits: Any) -> Any:
    extra = {"label": label, "unit": unit or None, "advanced": advanced}
    return Field(default, description=help, json_schema_extra=extra, **limits)


class Options(BaseModel):
    """How a sweep goes about its space; see `nbtune.sweep.sweep.sweep`."""

    sampler: Literal["grid", "random", "tpe", "gp"] = _option(
        "grid", "grid: every combination. random: by chance. tpe, gp: chosen as results come in.", "Sampler"
    )
    trials: int | None = _option(None, "How many at most; only a grid knows by itself.", "Trials", ge=1)
    jobs: int = _option(1, "How many run at a time, each with its share of threads and GPUs.", "At a time", ge=1)
    repeats: int = _option(1, "How often each point is tried, each time with another seed.", "Repeats", ge=1)
    together: Literal["never", "auto", "always"] = _option(
        "never",
        "Trials that share a base model are trained in one process; auto: where the plan says it is faster.",
        "On one base",
    )
    hours: float | None = _option(None, "After which no trial starts.", "Budget", unit="hours", gt=0)
    first: int | None = _option(
        None, "From this step on, trials that fall behind are stopped early.", "Stop early from", unit="steps", ge=1
    )
    factor: int = _option(3, "Stopping early keeps the best of so many.", "Keep one of", advanced=True, ge=2)
    timeout: float | None = _option(
        None, "After which a trial is killed.", "Time limit", unit="seconds", advanced=True, gt=0
    )
    metric: Literal["eval_loss_after", "train_loss"] = _option(
        "eval_loss_after", "By which trials are compared; less is better.", "Metric", advanced=True
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of `nbtune.sweep`."""
        together: Together = {"never": False, "auto": "auto", "always": True}[self.together]
        halving = Halving(self.first, self.factor) if self.first is not None else None
        return self.model_dump(exclude={"first", "factor"}) | {"together": together, "halving": halving}


class Varied:
    """One setting: a line for its values."""

    def __init__(self, field: form.Field, on_change: Callable[[Any], None]) -> None:
        self.field = field
        self.error = ""
        setting = field.setting
        self.control = widgets.Text(
            description=setting.label, tooltip=setting.path, continuous_update=False,
            style={"description_width": form.LABEL_WIDTH}, layout=widgets.Layout(width="340px"))  # fmt: skip
        # In line with that of a form's field, which has the room of a button before it.
        beside = widgets.Layout(flex="1 1 180px", min_width="160px", margin="2px 2px 2px 46px")
        self._help = widgets.HTML(layout=beside)
        row = widgets.Layout(flex_flow="row wrap", align_items="center")
        self.widget = widgets.HBox([self.control, self._help], layout=row)
        self.widget.add_class("nt-field")
        self.control.observe(on_change, names="value")
        self.say_current()

    def say_current(self) -> None:
        """Show the value that it has in the form, which stays where nothing is typed."""
        self.control.placeholder = str(self.field.control.value)
        self.mark(self.error)

    def values(self) -> list[Any] | Range | None:
        """What is typed, each value as the setting has it; None where nothing is. Raises FieldError."""
        if not self.control.value.strip():
            return None
        try:
            found = read(self.field.setting.name, self.control.value)
        except NbtuneError as error:
            raise form.FieldError(" ".join(str(error).split("\n"))) from error
        if isinstance(found, Range):
            for bound in (found.low, found.high):
                self.field.checked(bound)
            return found
        return [self.field.checked(value) for value in found]

    def mark(self, reason: str) -> None:
        """Show what is wrong with it, or its help."""
        self.error = reason
        wrong = f'<div class="nt-invalid" role="alert">{escape(reason)}</div>' if reason else ""
        self._help.value = f'<div class="nt-help">{wrong}{escape(self.field.setting.help)}</div>'
        (self.control.add_class if reason else self.control.remove_class)("nt-bad")


class SweepPage:
    """What to vary, how, and the trials that this makes.

    Args:
        spec_form: Of the whole run.
        host: The wizard.
        on_start: Told the sweep that was started.
    """

    def __init__(self, spec_form: SpecForm, host: Host, on_start: Callable[[Sweep], None]) -> None:
        self._form, self._host, self._on_start = spec_form, host, on_start
        self.varied: dict[str, Varied] = {}  # by the path of the setting
        self._names: dict[str, str] = {}  # of the settings in the space, by their paths
        self._look = form.Look("340px")
        self.options = {found.name: self._made(found) for found in model_settings("sweep", Options)}
        self._group = form.Group(list(self.options.values()))
        self._basic, self._more = widgets.VBox(), widgets.VBox(layout=widgets.Layout(display="none"))
        self.more = widgets.ToggleButton(description="▸ More settings", tooltip="Settings that rarely need a change")
        self.more.add_class("nt-link")
        self.more.observe(host.act(self._unfold), names="value")
        self.trials = widgets.HTML()
        self.run_button = host.button(
            "Run the sweep",
            lambda: host.ask("sweep", "Starting the sweep …", self._try_to_run),
            "Each trial is a process",
        )
        self.run_button.add_class("nt-primary")
        self.written = widgets.HTML()
        headings = [
            widgets.HTML(f'<div class="nt-heading">{text}</div>{hint}')
            for text, hint in (
                ("What to vary", f'<div class="nt-help" style="margin-bottom:4px">{_HINT}</div>'), ("How", ""),
                ("The trials", ""))
        ]  # fmt: skip
        css = widgets.HTML(f"<style>{_runtable.CSS}</style>", layout=widgets.Layout(display="none"))
        self.widget = widgets.VBox(
            [css, headings[0], self._basic, self.more, self._more, headings[1], self._group.widget, headings[2],
             self.trials, widgets.HBox([self.run_button, self.written])]
        )  # fmt: skip
        self.widget.add_class("nt-review")
        self._kept: tuple[str, Path] | None = None  # the notebook that was written last, as text, and its file
        self._planner: tuple[tuple[str, int], Forecaster] | None = None

    @property
    def looks(self) -> list[widgets.Widget]:
        """What its fields share, to be given back."""
        return self._look.parts

    def refresh(self, spec: RunSpec) -> None:
        """Offer the settings of the form, and plan the trials."""
        self._offer(spec)
        self._plan()

    def set(self, **values: str) -> None:
        """As typed, by the name or the path of a setting: `set(r="4, 8")`."""
        self._offer(self._form.spec)
        for name, text in values.items():
            path = next(path for path in self.varied if name in (path, path.split(".", 1)[1]))
            self.varied[path].control.value = text

    @property
    def space(self) -> Space:
        """What is to be varied. Raises FormError, and marks the fields, where something typed is no value."""
        found, wrong = {}, []
        for path, varied in self.varied.items():
            try:
                values = varied.values()
            except form.FieldError as error:
                varied.mark(str(error))
                wrong.append(f"{varied.field.setting.label}: {error}")
                continue
            varied.mark("")
            if values is not None:
                found[self._names[path]] = values
        wrong += [f"{option.setting.label}: {option.error}" for option in self.options.values() if option.error]
        if wrong:
            raise FormError("A setting is not valid", "\n".join(wrong))
        return found

    @property
    def chosen(self) -> Options:
        return Options(**{name: field.value for name, field in self.options.items()})

    def run(self) -> Sweep:
        """Write the notebook, unless it is there already, and start the sweep. Raises NbtuneError as `nbtune.sweep`."""
        started = sweep(self._notebook(self._form.spec), self.space, **self.chosen.arguments)
        self.written.value = ""
        self._on_start(started)
        return started

    def _try_to_run(self) -> None:
        try:
            self.run()
        except NbtuneError as error:
            self.written.value = notice(str(error), "error")

    def _made(self, setting: Setting) -> form.Field:
        field = form.Field(setting, self._look)
        field.on_change = lambda _: self._changed()
        return field

    def _offer(self, spec: RunSpec) -> None:
        """A line for each setting that can be varied with the method that is chosen; what was typed stays."""
        self._names = echo.short_names(spec)
        fields = {path: field for path, field in self._form.fields.items() if field.setting.sweepable}
        if list(fields) != list(self.varied) or any(self.varied[path].field is not fields[path] for path in fields):
            typed = {path: varied.control.value for path, varied in self.varied.items()}
            act = self._host.act(self._changed)
            self.varied = {path: Varied(field, act) for path, field in fields.items()}
            for path, varied in self.varied.items():
                varied.control.value = typed.get(path, "")
            for box, advanced in ((self._basic, False), (self._more, True)):
                replace(box, [v.widget for v in self.varied.values() if v.field.setting.advanced is advanced])
        for varied in self.varied.values():
            varied.say_current()

    def _unfold(self) -> None:
        self._more.layout.display = None if self.more.value else "none"
        self.more.description = f"{'▾' if self.more.value else '▸'} More settings"

    def _changed(self) -> None:
        self._group.refresh()
        self._host.ask("sweep", "Planning the trials …", self._plan)

    def _plan(self) -> None:
        """Show the trials with what each will take, or what is wrong."""
        self.written.value = ""
        try:
            spec, space, options = self._form.spec, self.space, self.chosen
            if not space:
                self.trials.value = '<div class="nt-soft">Nothing is varied yet.</div>'
                self.run_button.disabled = True
                return
            with tempfile.TemporaryDirectory() as folder:
                design = Design(
                    SweepNotebook(echo.write_notebook(spec, Path(folder))), space, {}, options.sampler, options.repeats,
                    metric=options.metric,
                )  # fmt: skip
                preview = design.preview(
                    self._forecaster(design, spec, options), trials=options.trials, jobs=options.jobs
                )
        except NbtuneError as error:
            self.trials.value = notice(str(error), "error")
            self.run_button.disabled = True
            return
        self.trials.value = trials(preview)
        self.run_button.disabled = False

    def _forecaster(self, design: Design, spec: RunSpec, options: Options) -> Forecaster:
        """The one of before, with all that it planned, while the run and how many go at a time are the same."""
        key = (spec.to_yaml(), options.jobs)
        if self._planner is None or self._planner[0] != key:
            self._planner = key, Sweep(Path(), design, jobs=options.jobs).forecaster
        return self._planner[1]

    def _notebook(self, spec: RunSpec) -> Path:
        """The run as a notebook of this folder; the one that was written before, while it says the same."""
        import nbformat

        text = nbformat.writes(echo.notebook(spec))
        if self._kept is None or self._kept[0] != text or not self._kept[1].exists():
            self._kept = text, echo.write_notebook(spec, Path())
        return self._kept[1]


def trials(preview: Preview) -> str:
    """A preview in HTML."""
    names = list(dict.fromkeys(name for point, _ in preview.trials for name in point))
    heads = ["", *(name.rsplit(".", 1)[-1] for name in names), "Time", "Memory", ""]
    lines = []
    for number, (point, forecast) in enumerate(preview.trials[:SHOWN], 1):
        cells = [
            f"{number:03d}", *(show(point[name]) if name in point else "" for name in names),
            format_seconds(forecast.seconds) if forecast.seconds is not None else "?",
            format_bytes(forecast.peak_bytes) if forecast.peak_bytes is not None else "?",
            f"refused: {forecast.refused}" if forecast.refused else "",
        ]  # fmt: skip
        lines.append(_line("td", cells, dim=bool(forecast.refused)))
    more = len(preview.trials) - SHOWN
    rest = f'<div class="nt-soft nt-small">and {more} more</div>' if more > 0 else ""
    table = f"<table><thead>{_line('th', heads)}</thead><tbody>{''.join(lines)}</tbody></table>" if lines else ""
    return f'<div class="nt-b">{escape(preview.sentence())}</div><div class="nt-compared">{table}</div>{rest}'


def _line(kind: str, cells: Sequence[str], *, dim: bool = False) -> str:
    look = ' style="opacity:.6"' if dim else ""
    return f"<tr{look}>{''.join(f'<{kind}>{escape(cell)}</{kind}>' for cell in cells)}</tr>"
