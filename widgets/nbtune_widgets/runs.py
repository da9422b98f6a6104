"""All runs of a folder: sort them, see in what they differ, lay their curves over each other, name, annotate, delete.

    view = RunsView(folder)
    view.show()              # or: nbtune.runs() as the last line of a cell

A callback puts what is to be done on a queue and nothing else; one thread does it, and writes all that is seen.
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from IPython.display import display

from nbtune import shelf
from nbtune.errors import NbtuneError
from nbtune.run import Run, runs
from nbtune_widgets import _reports, _runtable, charts
from nbtune_widgets._board import show_if
from nbtune_widgets._runtable import COLUMNS, Facts
from nbtune_widgets._style import chip, notice, style
from nbtune_widgets.export import ExportForm
from nbtune_widgets.live import LIVE, LiveView, dispose

FIRST = 25  # runs that are shown until more are asked for
REFRESH_SECONDS = 3.0  # between two looks at the runs that go on
_WRAP = {"align_items": "center", "width": "100%", "flex_flow": "row wrap"}

Act = Callable[[], Any]


class RunsView:
    """The table and what can be done with the runs that are selected. `widget` is the box to place.

    Args:
        folder: The folder of runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.error: str | None = None  # the traceback of the last thing that went wrong
        self.view: LiveView | None = None  # of the run that was opened
        self.exporting: ExportForm | None = None
        self._runs: dict[str, Run] = {}
        self._facts: list[Facts] = []
        self._column, self._descending = COLUMNS[-1], False  # the youngest first
        self._all = False
        self._lines: dict[str, _Line] = {}
        self._to_delete: list[Run] = []
        self._thrown: list[Path] = []
        self._acts: queue.SimpleQueue[Act | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._build()
        self._refresh()

    @property
    def selected(self) -> list[Run]:
        """The runs that are ticked, in the order of the table."""
        return [self._runs[fact.id] for fact in self._facts if fact.id in self._lines and self._lines[fact.id].on]

    def select(self, *names: str) -> None:
        """Tick these runs, by id, and no others."""
        for run_id, line in self._lines.items():
            line.check.value = run_id in names

    def show(self) -> None:
        """Display the view in this cell; where there is no kernel any more a plain table is seen."""
        bundle: Any = self.widget._repr_mimebundle_()
        display({**bundle, "text/html": _runtable.plain(self._facts)}, raw=True)
        self.start()

    _ipython_display_ = show

    def start(self) -> None:
        """Follow the runs from a daemon thread, until `close()`."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._follow, name="nbtune-runs", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Give the widgets back. Runs go on."""
        if self._thread is not None:
            self._acts.put(None)
            self._thread.join()
            self._thread = None
        self._close_opened()
        dispose(self.widget, *(line.box for line in self._lines.values()), self._more)

    def _build(self) -> None:
        self._count = widgets.HTML(layout=widgets.Layout(flex="1 1 auto", min_width="0"))
        self._notice = widgets.HTML(layout=widgets.Layout(display="none"))
        self._undo = self._button("Undo", self._bring_back, "Bring the deleted runs back")
        self._confirm = self._button("Move to the trash", self._delete)
        self._keep = self._button("Keep", self._ask_nothing)
        refresh = self._button("Refresh", self._refresh)
        top = widgets.HBox([self._count, refresh], layout=widgets.Layout(**_WRAP))
        self.heads = {column.name: self._head(column) for column in COLUMNS}
        heads = widgets.HBox(list(self.heads.values()))
        heads.add_class("nt-grid")
        heads.add_class("nt-sort")
        self._table_head = widgets.HBox(
            [widgets.HTML(layout=widgets.Layout(flex="0 0 30px")), heads], layout=widgets.Layout(width="100%")
        )
        self._look = _Look()
        self._rows = widgets.VBox(layout=widgets.Layout(width="100%"))
        self._more = self._button("", self._show_all)
        self.open_button = self._button("Open", self._open, "Watch the run here, with its buttons")
        self.name_button = self._button("Name and note", self._edit)
        self.chat_button = self._button("Chat", self._chat, "Ask the base model and these runs, side by side")
        self.delete_button = self._button("Delete", self._ask_to_delete, "Move to the trash; it can be undone")
        self._hint = widgets.HTML()
        self.export_button = self._button("Export", self._export, "Write the trained model for other programs")
        buttons = [self.open_button, self.name_button, self.chat_button, self.export_button, self.delete_button]
        self._bar = widgets.HBox([*buttons, self._hint], layout=widgets.Layout(**_WRAP, margin="8px 0 0"))
        wide = widgets.Layout(width="430px")
        self.label = widgets.Text(description="Name", continuous_update=False, layout=wide)
        self.note = widgets.Textarea(description="Note", continuous_update=False, layout=wide)
        save, cancel = self._button("Save", self._save), self._button("Cancel", self._end_edit)
        save.add_class("nt-primary")
        self._editor = widgets.VBox(
            [self.label, self.note, widgets.HBox([save, cancel])], layout=widgets.Layout(display="none")
        )
        self._difference = widgets.HTML(layout=widgets.Layout(display="none"))
        self.charts = widgets.Output(layout=widgets.Layout(width="100%"))
        self._opened = widgets.VBox()
        told = widgets.HBox([self._notice, self._confirm, self._keep, self._undo], layout=widgets.Layout(**_WRAP))
        css = widgets.HTML(f"<style>{_runtable.CSS}</style>", layout=widgets.Layout(display="none"))
        card = widgets.VBox(
            [top, self._table_head, self._rows, self._more, self._bar, told, self._editor, self._difference,
             self.charts]
        )  # fmt: skip
        for name in ("nbtune", "nt-card"):
            card.add_class(name)
        self.widget = widgets.VBox([style(), css, card, self._opened])
        self.widget.add_class("nbtune")
        self._ask_nothing()

    def _button(self, text: str, act: Act, tooltip: str = "") -> widgets.Button:
        button = widgets.Button(description=text, tooltip=tooltip or None)
        button.on_click(lambda _: self._ask(act))
        return button

    def _head(self, column: _runtable.Column) -> widgets.Button:
        return self._button(column.name, lambda: self._sort(column), f"Sort by {column.name.lower()}")

    def _ask(self, act: Act) -> None:
        """All that a callback does."""
        self._acts.put(act)
        self.start()

    def _follow(self) -> None:
        """The thread that acts and writes."""
        while True:
            try:
                act = self._acts.get(timeout=REFRESH_SECONDS)
            except queue.Empty:
                act = self._look_again
            if act is None:
                return
            try:
                act()
            except Exception as error:  # noqa: BLE001 - a thread's exception is seen by nobody: keep it and show it
                self.error = "".join(traceback.format_exception(error))
                text = str(error) if isinstance(error, NbtuneError) else f"{type(error).__name__}\n{error}"
                folded = "" if isinstance(error, NbtuneError) else _reports.folded("Traceback", self.error)
                self._say(notice(text, "error") + folded)

    def _refresh(self) -> None:
        """Look at the folder again."""
        self._runs = {run.id: run for run in runs(self.folder)}
        self._facts = [_runtable.read(run) for run in self._runs.values()]
        for gone in set(self._lines) - set(self._runs):
            self._lines.pop(gone).close()
        self._arrange()

    def _look_again(self) -> None:
        """Look at the runs that go on, and at those that went on a moment ago."""
        facts = [_runtable.read(self._runs[old.id]) if old.status in LIVE else old for old in self._facts]
        if facts != self._facts:
            self._facts = facts
            self._arrange()

    def _sort(self, column: _runtable.Column) -> None:
        self._descending = not self._descending if column is self._column else False
        self._column = column
        self._arrange()

    def _show_all(self) -> None:
        self._all = True
        self._arrange()

    def _arrange(self) -> None:
        """Put the rows in their order, and show what goes with those that are selected."""
        self._facts = _runtable.ordered(self._facts, self._column, descending=self._descending)
        shown = self._facts if self._all else self._facts[:FIRST]
        for fact in shown:
            if fact.id not in self._lines:
                self._lines[fact.id] = _Line(fact, self._look, lambda: self._ask(self._compare))
            self._lines[fact.id].write(fact)
        self._rows.children = [self._lines[fact.id].box for fact in shown]
        for column in COLUMNS:
            here = column is self._column
            mark = (" ▾" if self._descending else " ▴") if here else ""
            self.heads[column.name].description = column.name + mark
            (self.heads[column.name].add_class if here else self.heads[column.name].remove_class)("nt-on")
        self._more.description = f"Show all {len(self._facts)}"
        show_if(self._more, len(shown) < len(self._facts))
        show_if(self._table_head, bool(self._facts))
        runs_here = f"{len(self._facts)} run{'' if len(self._facts) == 1 else 's'}"
        place = chip("/".join(self.folder.parts[-2:]))
        self._count.value = f'<div class="nt-row"><span class="nt-name">Runs</span>{chip(runs_here)}{place}</div>'
        self._compare()

    def _compare(self) -> None:
        """Show the buttons that apply, and of several runs the differences and the curves."""
        chosen = self.selected
        show_if(self.open_button, len(chosen) == 1)
        show_if(self.name_button, len(chosen) == 1)
        show_if(self.chat_button, bool(chosen))
        show_if(self.export_button, len(chosen) == 1 and chosen[0].status not in LIVE)
        show_if(self.delete_button, bool(chosen))
        hint = "" if chosen else "Select runs to open, compare, name or delete them." if self._facts else _EMPTY
        if len(chosen) == 1:
            hint = escape(chosen[0].about.note)
        self._hint.value = f'<span class="nt-soft" style="white-space:pre-wrap">{hint}</span>'
        show_if(self._difference, len(chosen) > 1)
        if len(chosen) < 2:
            self.charts.outputs = ()
            return
        self._difference.value = _runtable.compared([run.name for run in chosen], shelf.difference(chosen))
        data = charts.overlay([(run.name, run.events()) for run in chosen])
        if not self.charts.outputs or self.charts.outputs[0]["data"] != data:
            self.charts.outputs = ({"output_type": "display_data", "data": data, "metadata": {}},)

    def _open(self) -> None:
        (run,) = self.selected
        self._close_opened()
        self.view = LiveView(run, after=True)
        self._opened.children = (self.view.widget,)
        self.view.start()

    def _export(self) -> None:
        (run,) = self.selected
        self._close_opened()
        self.exporting = ExportForm(run)
        self._opened.children = (self.exporting.widget,)

    def _close_opened(self) -> None:
        for opened in (self.view, self.exporting):
            if opened is not None:
                opened.close()
        self.view = self.exporting = None

    def _edit(self) -> None:
        (run,) = self.selected
        self.label.value, self.note.value = run.about.label, run.about.note
        self.label.placeholder = run.name
        self._editor.layout.display = None

    def _end_edit(self) -> None:
        self._editor.layout.display = "none"

    def _save(self) -> None:
        (run,) = self.selected
        self._end_edit()
        try:
            if self.label.value != run.about.label:
                run.rename(self.label.value)
            if self.note.value != run.about.note:
                run.annotate(self.note.value)
        finally:  # what is kept is shown, also where MLflow did not take it
            self._refresh()

    def _chat(self) -> None:
        from nbtune.compare.arena import arena

        chosen = self.selected
        self._say(notice("Loading the model …", "info"))
        url = arena("base", *chosen, runs_dir=self.folder).url
        names = escape(", ".join(run.name for run in chosen))
        link = f'<a href="{url}" target="_blank" rel="noopener">{url}</a>'
        self._say(f'<div class="nt-problem nt-info">The base model and {names} answer at {link}</div>')

    def _ask_to_delete(self) -> None:
        chosen = self.selected
        if going := [run.name for run in chosen if run.status in ("running", "paused")]:
            self._ask_nothing()
            self._say(notice(f"Still running: {', '.join(going)}\nStop it before you delete it.", "error"))
            return
        names = ", ".join(run.name for run in chosen)
        self._to_delete = chosen
        self._say(notice(f"Delete {names}?\nMoved to {self.folder / shelf.TRASH}, with checkpoints and adapters."))
        for button in (self._confirm, self._keep):
            button.layout.display = None
        self._undo.layout.display = "none"

    def _delete(self) -> None:
        self._ask_nothing()
        self._thrown = []
        try:
            for run in self._to_delete:
                self._thrown.append(run.delete())
        finally:
            self._refresh()
        count = len(self._thrown)
        self._say(notice(f"{count} run{'' if count == 1 else 's'} moved to the trash.", "info"))
        self._undo.layout.display = None

    def _bring_back(self) -> None:
        self._ask_nothing()
        while self._thrown:
            shelf.restore(self._thrown.pop())
        self._refresh()

    def _ask_nothing(self) -> None:
        self._say("")
        for button in (self._confirm, self._keep, self._undo):
            button.layout.display = "none"

    def _say(self, html: str) -> None:
        self._notice.value = html
        show_if(self._notice, bool(html))


class _Look:
    """Layouts that all rows share: each is a widget of its own."""

    def __init__(self) -> None:
        self.check = widgets.Layout(width="30px", flex="0 0 30px")
        self.cells = widgets.Layout(flex="1 1 auto", min_width="0")
        self.box = widgets.Layout(width="100%")


class _Line:
    """A row of the table: a box to tick, and the run's facts."""

    def __init__(self, fact: Facts, look: _Look, on_tick: Act) -> None:
        self.check = widgets.Checkbox(indent=False, tooltip=f"Select {fact.name}", layout=look.check)
        self.check.observe(lambda _: on_tick(), names="value")
        self._cells = widgets.HTML(layout=look.cells)
        self.box = widgets.HBox([self.check, self._cells], layout=look.box)
        self.box.add_class("nt-run")

    @property
    def on(self) -> bool:
        return self.check.value

    def write(self, fact: Facts) -> None:
        self._cells.value = _runtable.row(fact)

    def close(self) -> None:
        """Give back what is its own; the layouts are those of all rows."""
        for part in (self.check.style, self._cells.style, self.check, self._cells, self.box):
            part.close()


_EMPTY = "No runs yet: nbtune.wizard() or nbtune.train(spec) makes one."
_shown: RunsView | None = None  # the one on the screen: a cell that is run again must not leave its widgets behind


def show_runs(folder: Path) -> RunsView:
    """Display the runs of a folder in this cell. A view that was shown before is closed."""
    global _shown
    former, _shown = _shown, RunsView(folder)
    _shown.show()
    if former is not None:
        former.close()
    return _shown
