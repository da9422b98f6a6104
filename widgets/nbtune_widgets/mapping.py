"""What the parts of a row are made of: a column from a list, or a text with columns in braces."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from html import escape
from typing import Any

import ipywidgets as widgets

from nbtune.spec import DataFormat, DataSpec
from nbtune_widgets._page import Host, replace

TEXT = "a text …"  # in the list of columns: write one with columns in braces
_FORMS = [name for name in typing.get_args(DataFormat) if name != "auto"]
_LABEL = {"description_width": "128px"}


class MappingEditor:
    """A line for each part of the chosen form. What is chosen is told once every part that is needed has its column."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._columns: Mapping[str, str] = {}
        self._shown: tuple[Any, ...] = ()
        self._filling = False
        self.parts: dict[str, PartLine] = {}
        self.form = widgets.Dropdown(
            description="Form of a row", options=[(name.replace("_", " / "), name) for name in _FORMS],
            style=_LABEL, layout=widgets.Layout(width="290px"))  # fmt: skip
        self.form.observe(host.act(self._other_form), names="value")
        self.as_found = host.button("as found", self.take_back, "Let the form be read from the columns")
        self.missing = widgets.HTML()
        self._lines = widgets.VBox()
        top = widgets.HBox([self.form, self.as_found, self.missing], layout=widgets.Layout(flex_flow="row wrap"))
        top.add_class("nt-line")
        self.widget = widgets.VBox([top, self._lines])

    def show(self, spec: DataSpec, columns: Mapping[str, str], form: str, mapping: Mapping[str, str]) -> None:
        """Show what rows with these columns are read as.

        Args:
            spec: The data's settings.
            columns: Column -> the beginning of a value.
            form: The form that was found, or what the settings say.
            mapping: Part -> column or text, where their names differ.
        """
        shown = (form, dict(columns), dict(mapping), spec.columns)
        if shown == self._shown:
            return
        same_columns = list(columns) == list(self._columns)
        self._shown, self._columns = shown, columns
        made_of = mapping or {name: name for name in columns}
        lines = {name: line.value for name, line in self.parts.items()}
        if not same_columns or form != self.form.value or any(made_of.get(n, "") != v for n, v in lines.items()):
            self._filling = True
            self.form.value = form
            self._make_lines(made_of)
            self._filling = False
        self.as_found.disabled = spec.columns is None and spec.format == "auto"
        self._say_missing()

    def take_back(self) -> None:
        """As a click: what the parts are made of is read from the columns again."""
        self._host.change({"data.format": "auto", "data.columns": None}, "columns")

    def _other_form(self) -> None:
        if not self._filling:
            self._make_lines({name: name for name in self._columns})
            self._tell()

    def _make_lines(self, made_of: Mapping[str, str]) -> None:
        from nbtune.data.formats import parts

        needed, optional = parts(str(self.form.value))
        self.parts = {
            name: PartLine(name, self._columns, made_of.get(name, ""), needed=name in needed)
            for name in (*needed, *optional)
        }
        for line in self.parts.values():
            line.on_change = self._host.act(self._tell)
        replace(self._lines, [line.widget for line in self.parts.values()])

    def _tell(self) -> None:
        """Change the settings, if nothing that is needed is missing."""
        if self._say_missing():
            return
        mapping = {name: line.value for name, line in self.parts.items() if line.value}
        plain = mapping == {name: name for name in self.parts if name in self._columns}
        self._host.change({"data.format": self.form.value, "data.columns": None if plain else mapping}, "columns")

    def _say_missing(self) -> list[str]:
        missing = [name for name, line in self.parts.items() if line.needed and not line.value]
        text = f"Choose what {' and '.join(missing)} is made of." if missing else ""
        self.missing.value = f'<span class="nt-invalid" role="status">{escape(text)}</span>' if text else ""
        return missing


class PartLine:
    """One part of a row, the column that it is made of, and a value of it. `value` is a column, a text, or ""."""

    def __init__(self, name: str, columns: Mapping[str, str], made_of: str, *, needed: bool) -> None:
        self.needed = needed
        self._columns = columns
        self.on_change: typing.Callable[[Any], None] = lambda _: None
        empty = ("choose …" if needed else "nothing", "")
        self.column = widgets.Dropdown(
            description=name, options=[empty, *((column, column) for column in columns), (TEXT, TEXT)],
            value=made_of if made_of in columns or not made_of else TEXT,
            style=_LABEL, layout=widgets.Layout(width="290px"))  # fmt: skip
        self.text = widgets.Textarea(
            value=made_of if self.column.value == TEXT else "", rows=2, continuous_update=False,
            placeholder=" ".join(f"{{{column}}}" for column in columns),
            layout=widgets.Layout(width="320px"))  # fmt: skip
        self.example = widgets.HTML(layout=widgets.Layout(flex="1 1 160px", min_width="0"))
        self.widget = widgets.HBox([self.column, self.text, self.example], layout=widgets.Layout(flex_flow="row wrap"))
        self.widget.add_class("nt-line")
        self._show()
        self.column.observe(self._changed, names="value")
        self.text.observe(self._changed, names="value")

    @property
    def value(self) -> str:
        return self.text.value if self.column.value == TEXT else str(self.column.value)

    def _changed(self, change: Any) -> None:
        self._show()
        self.on_change(change)

    def _show(self) -> None:
        self.text.layout.display = None if self.column.value == TEXT else "none"
        example = self._columns.get(str(self.column.value), "")
        self.example.value = f'<span class="nt-help">{escape(example)}</span>'
