"""The steps of a recipe as a list: each with its few settings, how many rows it leaves, and some that it dropped."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from nbtune import recipe
from nbtune.spec import DataSpec, MixedSpec
from nbtune_widgets._lines import Line, Lines
from nbtune_widgets._page import Host

if TYPE_CHECKING:
    from pydantic import BaseModel

    from nbtune.data.recipe import StepReport

STEPS: dict[str, type[BaseModel]] = {
    cls.model_fields["step"].default: cls for cls in typing.get_args(typing.get_args(recipe.Step)[0])
}
# What a step that was just added says; of one that is not here, nothing has to be said.
_FIRST: dict[str, dict[str, Any]] = {"length": {"at_most": 4000}, "sample": {"rows": 1000}}


class RecipeEditor:
    """The steps that rows go through, in order."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._given: list[Any] = []
        self.lines = Lines(self._changed, "No steps: every row is used as it comes.")
        self.kind = widgets.Dropdown(
            description="Add a step", options=[(_words(cls), name) for name, cls in STEPS.items()],
            style={"description_width": "80px"}, layout=widgets.Layout(width="min(560px, 80%)"))  # fmt: skip
        self.add_button = host.button("Add", lambda: self.add(str(self.kind.value)))
        adding = widgets.HBox([self.kind, self.add_button], layout=widgets.Layout(flex_flow="row wrap"))
        adding.add_class("nt-line")
        self.widget = widgets.VBox([self.lines.widget, adding])

    def show(self, spec: DataSpec, reports: Sequence[StepReport]) -> None:
        """Show the steps of these settings, and what each of them did as far as that is known."""
        self._given = list(spec.recipe)
        if self.lines.values != self._given:
            made = [Line(type(step), step.model_dump(), self._host) for step in spec.recipe]
            self.lines.fill(made)
        left = list(reports)
        for place, line in enumerate(self.lines.lines, start=1):
            step = line.value
            found = next((report for report in left if report.step == step), None)
            if found is not None:
                left.remove(found)
            line.title.value = _title(place, line.cls, found)

    def add(self, kind: str) -> None:
        """As a click on Add: a step at the end."""
        line = Line(STEPS[kind], _FIRST.get(kind, {}), self._host)
        line.title.value = _title(len(self.lines.lines) + 1, STEPS[kind], None)
        self.lines.add(line)

    def _changed(self, steps: list[BaseModel]) -> None:
        if steps != self._given:  # a step that says nothing yet changes nothing
            self._host.change({"data.recipe": [step.model_dump(mode="json") for step in steps]}, "recipe")


class MixEditor:
    """Other sources whose rows are mixed in, each with its weight."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.lines = Lines(self._changed, "Only the rows of the first source.")
        self.add_button = host.button("Add a source", self.add, "Rows of another file or dataset")
        self.widget = widgets.VBox([self.lines.widget, self.add_button])

    def show(self, spec: DataSpec, offered: Sequence[str]) -> None:
        """Show the sources of these settings; `offered` complete what is typed."""
        if self.lines.values != spec.mix:
            self.lines.fill([self._line(mixed) for mixed in spec.mix])
        for line in self.lines.lines:
            line.fields["source"].offer(offered)
            line.title.value = _mixed(line.value)

    def add(self) -> None:
        """As a click on the button."""
        self.lines.add(self._line(MixedSpec(weight=0.1)))

    def _line(self, mixed: MixedSpec) -> Line:
        line = Line(MixedSpec, mixed.model_dump(), self._host, ("source", "weight", "format", "split"))
        line.title.value = _mixed(mixed)
        return line

    def _changed(self, mix: list[BaseModel]) -> None:
        for line in self.lines.lines:
            line.title.value = _mixed(line.value)
        self._host.change({"data.mix": [mixed.model_dump(mode="json") for mixed in mix]}, "mix")


def _words(cls: type[BaseModel]) -> str:
    """The first sentence of what a step does."""
    name = cls.model_fields["step"].default
    return f"{name}: {(cls.__doc__ or '').partition('.')[0].strip()}"


def _title(place: int, cls: type[BaseModel], report: StepReport | None) -> str:
    if report is None:
        return f'<span class="nt-soft">{place}</span> <span class="nt-b">{escape(_words(cls))}</span>'
    rows = f"{report.before:,} → {report.after:,} rows"
    head = f'<span class="nt-soft">{place}</span> <span class="nt-b">{escape(report.label)}</span> · {rows}'
    if not report.examples:
        return head
    examples = "".join(f"<div>{escape(example)}</div>" for example in report.examples)
    gone = len(report.dropped) - len(report.examples)
    more = f"<div>and {gone:,} more</div>" if gone else ""
    dropped = f"{len(report.dropped):,} dropped"
    return (
        f'<details><summary>{head}, {dropped}</summary><div class="nt-soft nt-small">{examples}{more}</div></details>'
    )


def _mixed(value: Any) -> str:
    if not isinstance(value, MixedSpec):
        return '<span class="nt-soft">not complete yet</span>'
    much = "all of its rows" if value.weight is None else f"{value.weight:g} rows for each row of the first source"
    return f'<span class="nt-b">{escape(value.source)}</span> <span class="nt-soft">{much}</span>'
