"""Where the rows come from: a path or a name with completion, a table of this notebook, or a pasted text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ipywidgets as widgets

from nbtune.errors import DataError
from nbtune.spec import DataSpec, RunSpec
from nbtune_widgets._frame import set_class
from nbtune_widgets._offers import data_files, tables
from nbtune_widgets._page import Host
from nbtune_widgets.live import dispose
from nbtune_widgets.specform import SOURCE, SpecForm

BUTTONS = 6  # of files, and of tables; the line completes the others


class SourcePicker:
    """The field `data.source`, with what there is to choose from as buttons, and a box to paste rows into."""

    def __init__(self, form: SpecForm, host: Host) -> None:
        self._form = form
        self._host = host
        self._spec: RunSpec | None = None
        self._found: tuple[list[str], dict[str, int]] | None = None  # data files, and tables with their rows
        self._names: dict[str, str] = {}  # source of rows in memory -> what a person calls them
        self.offered: list[str] = []  # what the line completes
        self.buttons: dict[str, widgets.Button] = {}  # by source, or by the name of a table
        self.open_paste = host.button("Paste rows …", self._toggle_paste, "A box for rows that are in no file")
        self._offers = widgets.HBox([self.open_paste], layout=widgets.Layout(flex_flow="row wrap"))
        self._offers.add_class("nt-sources")
        self.paste = widgets.Textarea(
            placeholder='Rows to paste: JSON, JSON lines, CSV with a line of column names, or plain text',
            rows=6, layout=widgets.Layout(width="auto"), continuous_update=False)  # fmt: skip
        self.use = host.button("Use these rows", self.use_pasted)
        self._pasting = widgets.VBox([self.paste, self.use], layout=widgets.Layout(display="none"))
        self._pasting.add_class("nt-panel")
        self.widget = widgets.VBox([form.fields[SOURCE].widget, self._offers, self._pasting])

    def refresh(self, spec: RunSpec) -> None:
        """Look again at what there is to choose from. Called on the worker's thread."""
        self._spec = spec
        source = spec.data.source
        files = data_files(Path.cwd(), near=None if spec.data.rows is not None else source)
        found = {name: len(value) for name, value in tables().items()}
        if (files, found) != self._found:
            self._found = (files, found)
            self._offer(files, found)
        for name, button in self.buttons.items():
            set_class(button, "nt-on", on=name in (source, self._names.get(source)))

    def _offer(self, files: list[str], found: dict[str, int]) -> None:
        self.offered = ["stdlib-docs", *files]
        self._form.fields[SOURCE].offer(self.offered)
        groups = {
            "Built in": {"stdlib-docs": self._file_button("stdlib-docs")},
            "in this folder": {name: self._file_button(name) for name in _worth_a_button(files)},
            "in this notebook": {
                name: self._table_button(name, count) for name, count in list(found.items())[:BUTTONS]
            },
        }
        self.buttons = {name: button for buttons in groups.values() for name, button in buttons.items()}
        shown = [[_title(title), *buttons.values()] for title, buttons in groups.items() if buttons]
        former = [part for part in self._offers.children if part is not self.open_paste]
        self._offers.children = [*(part for group in shown for part in group), self.open_paste]
        dispose(*former)

    @property
    def label(self) -> str:
        """What the data is called: the name of a file, of a table of the notebook, or of a dataset."""
        if self._spec is None:
            return ""
        source = self._spec.data.source
        if self._spec.data.rows is not None:
            return self._names.get(source, "rows given in Python")
        return Path(source).name if Path(source).exists() else source

    def choose(self, source: str) -> None:
        """As a click on the button of a file or of a built-in name."""
        self._host.change({"data": {**self._kept, "source": source}}, Path(source).name)

    def take(self, name: str) -> None:
        """As a click on the button of a table: the rows that it has now."""

        def work() -> None:
            try:
                self._give(DataSpec.from_rows(tables()[name], **self._kept), name)
            except ValueError as error:
                raise DataError(f"{name} cannot be used as rows", f"{error}") from error

        self._host.ask("rows", f"Reading {name} …", work)

    def use_pasted(self) -> None:
        """As a click on the button below the box."""
        from nbtune.data.sources import from_text

        text, name = self.paste.value, "pasted rows"
        self._host.ask("rows", f"Reading the {name} …", lambda: self._give(from_text(text, **self._kept), name))

    def _give(self, rows: DataSpec, name: str) -> None:
        self._names[rows.source] = name
        self._pasting.layout.display = "none"
        self._host.change({"data": rows}, name)

    @property
    def _kept(self) -> dict[str, Any]:
        """The settings of the data that another source keeps; its columns are others."""
        return {} if self._spec is None else self._spec.data.model_dump(exclude={"source", "columns", "format"})

    def _toggle_paste(self) -> None:
        self._pasting.layout.display = None if self._pasting.layout.display == "none" else "none"

    def _file_button(self, source: str) -> widgets.Button:
        return self._host.button(source, lambda: self.choose(source), "Use this data")

    def _table_button(self, name: str, count: int) -> widgets.Button:
        return self._host.button(f"{name} · {count:,} rows", lambda: self.take(name), "Use the rows that it has now")


def _worth_a_button(files: list[str]) -> list[str]:
    """Files in this folder that are rows: prose is more often a README."""
    here = [name for name in files if Path(name).suffix not in (".txt", ".md") and not Path(name).is_absolute()]
    return sorted(here, key=lambda name: name.count("/"))[:BUTTONS]


def _title(text: str) -> widgets.HTML:
    first = text == "Built in"
    html = f'<span class="nt-soft nt-small{"" if first else " nt-of"}">{text}</span>'
    return widgets.HTML(html, layout=widgets.Layout(width="132px" if first else "auto"))
