"""The Data step: which rows, what becomes of them, and each of them as the model reads it, with its loss."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from nbtune.chat_templates import chat_template
from nbtune.errors import DataError
from nbtune.spec import RunSpec
from nbtune_widgets import _datastyle, _dropped, _lengths
from nbtune_widgets._doors import Doors
from nbtune_widgets._page import Host, replace
from nbtune_widgets._style import chip, notice
from nbtune_widgets.mapping import MappingEditor
from nbtune_widgets.preview import RowPreview
from nbtune_widgets.recipe import MixEditor, RecipeEditor
from nbtune_widgets.source import SourcePicker
from nbtune_widgets.specform import SpecForm
from nbtune_widgets.template import TEMPLATE, TemplateEditor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nbtune.data.report import DataReport

LENGTH, RECIPE = "training.max_length", "data.recipe"
_UNSHOWN = "The model's chat template cannot show these rows."
_NO_TEMPLATE = "The model has no chat template, so it does not say how a chat is written."
CHATML = "chatml"  # the standard template that writes function calls


class DataPage:
    """Where the rows come from, what was found in them, a row to look at, their lengths, and what is left out."""

    def __init__(self, form: SpecForm, host: Host) -> None:
        self._host = host
        self._spec: RunSpec | None = None
        self._read_by: dict[str, Any] = {}  # the settings that the tokenizer was loaded with
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._shown = ""  # the source of the rows in the preview
        self.report: DataReport | None = None
        self.source = SourcePicker(form, host)
        self.facts, self.lengths, self.dropped = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.preview = RowPreview(host)
        self.warnings = widgets.VBox()
        self.mapping, self.recipe = MappingEditor(host), RecipeEditor(host)
        self.mix, self.template = MixEditor(host), TemplateEditor(host, lambda: self.preview.number.value)
        self.doors = Doors(
            {
                "columns": self.mapping.widget,
                "recipe": self.recipe.widget,
                "mix": self.mix.widget,
                "chat template": self.template.widget,
            },
            host,
        )
        right = widgets.VBox(
            [self.lengths, self.warnings, self.dropped], layout=widgets.Layout(flex="2 1 280px", min_width="0")
        )
        columns = widgets.HBox([self.preview.widget, right], layout=widgets.Layout(flex_flow="row wrap"))
        columns.add_class("nt-columns")
        settings = form.groups["data"].widget
        self.widget = widgets.VBox(
            [_datastyle.style(), self.source.widget, self.facts, columns, self.doors.widget, settings]
        )

    def refresh(self, spec: RunSpec) -> None:
        """Read, render and tokenise the rows as training would, and show what came of it.

        Called on the worker's thread. Raises NbtuneError where the data cannot be read.
        """
        self._spec = spec
        self.source.refresh(spec)
        self.preview.busy = True
        try:
            self.report = self._read(spec)
        except DataError:
            self._forget()
            self._offer_mending(spec)
            raise
        finally:
            self.preview.busy = False
        self._show(self.report)
        self._show_editors(spec, self.report)

    def drop_longer(self) -> None:
        """As a click: a step of the recipe that drops what would be cut."""
        self._add_step({"step": "length", "of": "row", "unit": "tokens", "at_most": self._given.training.max_length})

    def drop_unusable(self) -> None:
        """As a click: a step of the recipe that drops what cannot be used."""
        self._add_step({"step": "usable"})

    @property
    def _given(self) -> RunSpec:
        assert self._spec is not None
        return self._spec

    def _add_step(self, step: Mapping[str, Any]) -> None:
        steps = self._given.to_dict()["data"]["recipe"]
        self._host.change({RECIPE: [*steps, dict(step)]}, "recipe")

    def _read(self, spec: RunSpec) -> DataReport:
        from nbtune.data.report import report
        from nbtune.models import load_tokenizer

        named = spec.model.model_dump(include={"name", "revision", "chat_template", "trust_remote_code"})
        if self._tokenizer is None or named != self._read_by:
            self._tokenizer = load_tokenizer(spec.model, on_status=self._host.say)
            self._read_by = named
        return report(spec.data, self._tokenizer, spec.training.max_length, on_status=self._host.say)

    def _forget(self) -> None:
        self.report = None
        self.preview.close()
        replace(self.warnings, [])
        self.facts.value = self.lengths.value = self.dropped.value = ""

    def _offer_mending(self, spec: RunSpec) -> None:
        """Where training would not start: the columns that there are, the steps, and the templates to choose from."""
        self.recipe.show(spec.data, [])
        self.mix.show(spec.data, self.source.offered)
        if self._tokenizer is not None:
            self.template.show(spec, self._tokenizer, None)
            self.doors.mark("chat template", self.template.said, wrong=not self._has_template)
        try:
            columns = self._columns(spec)
        except DataError:  # the same, which is said already
            return
        form = spec.data.format if spec.data.format != "auto" else "prompt_completion"
        self.mapping.show(spec.data, columns, form, spec.data.columns or {})
        if not _has_form(spec, columns):
            self.doors.open("columns")
        elif spec.model.chat_template != CHATML and self._is_shown_by(CHATML, spec):
            use = self._host.button(f"use {CHATML}", lambda: self._host.change({TEMPLATE: CHATML}, "chat template"))
            title = _UNSHOWN if self._has_template else _NO_TEMPLATE
            replace(self.warnings, [_warning(title, f"The standard {CHATML} can.", [use])])
            self.doors.open("chat template")

    def _is_shown_by(self, template: str, spec: RunSpec) -> bool:
        """Whether the rows can be used with a standard template."""
        from nbtune.data.report import report

        tokenizer = copy.copy(self._tokenizer)
        assert tokenizer is not None
        tokenizer.chat_template = chat_template(template)
        try:
            report(spec.data, tokenizer, spec.training.max_length, on_status=self._host.say)
        except DataError:
            return False
        return True

    def _columns(self, spec: RunSpec) -> dict[str, str]:
        from nbtune.data.report import read_columns

        return read_columns(spec.data, on_status=self._host.say)

    def _show(self, report: DataReport) -> None:
        self.facts.value = _facts(self.source.label, report)
        self.dropped.value = _dropped.folds(report)
        replace(self.warnings, self._warnings(report))
        heading = '<div class="nt-heading">Length in tokens</div>'
        drawn = _lengths.histogram(report.lengths, report.max_length) if len(report.lengths) else ""
        self.lengths.value = heading + drawn if drawn else ""
        source = self._given.data.source
        self.preview.show(report, first=source != self._shown)
        self._shown = source

    def _show_editors(self, spec: RunSpec, report: DataReport) -> None:
        assert self._tokenizer is not None
        self.mapping.show(spec.data, report.columns, report.form, report.mapping)
        self.recipe.show(spec.data, report.steps)
        self.mix.show(spec.data, self.source.offered)
        self.template.show(spec, self._tokenizer, report)
        self.doors.mark("columns", "chosen" if spec.data.columns or spec.data.format != "auto" else "as found")
        self.doors.mark("recipe", _count(len(spec.data.recipe), "step"))
        self.doors.mark("mix", _count(len(spec.data.mix), "source"))
        self.doors.mark("chat template", self.template.said)

    def _warnings(self, report: DataReport) -> list[widgets.DOMWidget]:
        found: list[widgets.DOMWidget] = [widgets.HTML(notice(note)) for note in report.notes]
        if report.problem is not None:
            drop = self._host.button("drop them", self.drop_unusable, "Add the step `usable` to the recipe")
            found.append(_warning(report.problem.title, _reasons(report.unusable), [drop]))
        if report.longer and report.form != "text":  # plain text goes on in the next example
            found.append(self._too_long(report))
        return found

    def _too_long(self, report: DataReport) -> widgets.DOMWidget:
        buttons = [self._host.button("drop them", self.drop_longer, "Add a step to the recipe that drops them")]
        longer = _lengths.longer_than(report.lengths, report.max_length)
        if longer <= self._context:
            act = lambda: self._host.change({LENGTH: longer}, f"use {longer:,}")  # noqa: E731
            buttons.append(self._host.button(f"use {longer:,}", act, "As max_length: all rows fit, for more memory"))
        rows = "1 row is" if report.longer == 1 else f"{report.longer:,} rows are"
        ends = "Its end" if report.longer == 1 else "Their ends"
        return _warning(f"{rows} longer than {report.max_length:,} tokens.", f"{ends} would be cut.", buttons)

    @property
    def _has_template(self) -> bool:
        return self._tokenizer is not None and bool(self._tokenizer.chat_template)

    @property
    def _context(self) -> int:
        """The longest row that the model's tokenizer is made for."""
        assert self._tokenizer is not None
        return int(self._tokenizer.model_max_length)


def _warning(title: str, text: str, buttons: list[widgets.Button]) -> widgets.DOMWidget:
    said = widgets.HTML(
        f'<span class="nt-b">{escape(title)}</span> {escape(text)}', layout=widgets.Layout(flex="0 1 auto")
    )
    row = widgets.HBox([said, *buttons], layout=widgets.Layout(flex_flow="row wrap"))
    row.add_class("nt-warn")
    return row


def _reasons(unusable: Mapping[str, list[int]]) -> str:
    first = [f"row {numbers[0]:,}: {reason}" for reason, numbers in unusable.items()][:2]
    return "; ".join(first) + (" …" if len(unusable) > 2 else "")


def _facts(name: str, report: DataReport) -> str:
    """The name of the data, the form that was found and why, and how many rows there are."""
    left_out = sum(map(len, report.dropped.values())) + sum(map(len, report.unusable.values()))
    rows = f"{report.total:,} rows · {report.train:,} train · {report.held_out:,} held out"
    chips = [f"{report.form.replace('_', '/')}: {report.reason}", rows]
    chips += [f"{left_out:,} left out"] if left_out else []
    return f'<div class="nt-chips"><span class="nt-named">{escape(name)}</span>{"".join(map(chip, chips))}</div>'


def _has_form(spec: RunSpec, columns: Mapping[str, str]) -> bool:
    from nbtune.data.gather import form_of

    try:
        form_of(spec.data, list(columns))
    except DataError:
        return False
    return True


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}" if number else ""
