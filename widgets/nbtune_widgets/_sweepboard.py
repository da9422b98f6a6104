"""The widgets of a leaderboard and what shows where: headline, buttons, table, charts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets as widgets

from nbtune.sweep.space import Point, Space
from nbtune_widgets import _trialtable, charts, sweepcharts
from nbtune_widgets._adding import AddTrials
from nbtune_widgets._board import show_if
from nbtune_widgets._style import notice, style
from nbtune_widgets._trialtable import Facts
from nbtune_widgets.live import dispose

_WRAP = {"align_items": "center", "width": "100%", "flex_flow": "row wrap"}
Act = Callable[[], Any]

_LEGEND = (
    '<div class="nt-legend">'
    + "".join(
        f'<span><i style="background:{color};opacity:{opacity}"></i>{word}</span>'
        for color, opacity, word in (
            (sweepcharts.BEST, 1, "the best"), (sweepcharts.RUNNING, 1, "running"), (charts.SLATE, 0.5, "the others"),
        )
    )
    + "</div>"
)  # fmt: skip


class SweepBoard:
    """One card. It knows of no sweep.

    Args:
        space: Of the sweep, for the panel that adds trials.
        on_add: Told the points that are to be added.
        tell: Has a function done by the thread that owns the widgets.
    """

    def __init__(self, space: Space, on_add: Callable[[list[Point]], None], tell: Callable[[Act], None]) -> None:
        self._do = tell
        self.rows: dict[int, Row] = {}  # by trial
        self._look = Look()
        self._asked: Act | None = None  # what a person is asked to confirm
        self.header = widgets.HTML(layout=widgets.Layout(flex="1 1 auto", min_width="0"))
        self.start_button = self._button("Start", "Do what is left of the sweep")
        self.start_button.add_class("nt-primary")
        self.add_button = self._button("Add trials", "Other values, or more random points")
        self.arena_button = self._button(
            "Compare the best", "Chat with the base model and the best trials, side by side"
        )
        self.stop_button = self._button("Stop all", "End after the step in progress")
        buttons = [self.start_button, self.add_button, self.arena_button, self.stop_button]
        right = widgets.HBox(buttons, layout=widgets.Layout(align_items="center", margin="0 0 0 auto"))
        self.tiles = widgets.HTML()
        self.bar = widgets.FloatProgress(
            min=0, max=1, layout=widgets.Layout(width="100%", height="8px", margin="8px 0 0")
        )
        self.bar.add_class("nt-bar")
        self._notice = widgets.HTML(layout=widgets.Layout(display="none", flex="1 1 auto", min_width="0"))
        self.yes_button, self.no_button = self._button(""), self._button("Keep going")
        self.yes_button.on_click(lambda _: tell(self._confirm))
        self.no_button.on_click(lambda _: tell(self.ask_nothing))
        asking = widgets.HBox(
            [self._notice, self.yes_button, self.no_button], layout=widgets.Layout(align_items="center", width="100%")
        )
        self.told = widgets.HTML(layout=widgets.Layout(display="none"))  # the worker's
        self.adding = AddTrials(space, on_add, lambda act: lambda _: tell(act))
        self.head = widgets.HTML(layout=self._look.cells)
        self._table = widgets.VBox(layout=widgets.Layout(width="100%"))
        self._table.add_class("nt-trials")
        self.more_button = self._button("")
        top = widgets.HBox([self.head, widgets.HTML(layout=self._look.place)], layout=self._look.line)
        self.charts = widgets.Output(layout=widgets.Layout(width="100%"))
        legend = widgets.HTML(_LEGEND, layout=widgets.Layout(flex="1 1 auto"))
        self.log_scale, self.freeze = (
            widgets.Checkbox(description=name, indent=False, layout=widgets.Layout(width="auto", margin="2px"))
            for name in ("log scale", "freeze")
        )
        for control in (self.log_scale, self.freeze):
            control.observe(lambda _: tell(lambda: None), names="value")
        self.controls = widgets.HBox([legend, self.log_scale, self.freeze], layout=widgets.Layout(**_WRAP))
        self.controls.add_class("nt-controls")
        self.meaning = widgets.HTML()
        css = widgets.HTML(f"<style>{_trialtable.CSS}</style>", layout=widgets.Layout(display="none"))
        self._live = (top, self._table, self.more_button, self.charts, self.controls, self.meaning)
        first = widgets.HBox([self.header, right], layout=widgets.Layout(**_WRAP))
        parts = [style(), css, first, self.bar, self.tiles, asking, self.told, self.adding.widget]
        self.widget = widgets.VBox([*parts, *self._live])
        for name in ("nbtune", "nt-card"):
            self.widget.add_class(name)
        self.ask_nothing()

    def say(self, html: str) -> None:
        """Show a piece of news above the table, or nothing."""
        self._notice.value = html
        show_if(self._notice, bool(html))

    def ask(self, text: str, yes: str, act: Act) -> None:
        """Have something confirmed that cannot be undone."""
        self._asked, self.yes_button.description = act, yes  # before the question, which may be answered at once
        self.say(notice(text))
        for button in (self.yes_button, self.no_button):
            button.layout.display = None

    def ask_nothing(self) -> None:
        self._asked = None
        self.say("")
        for button in (self.yes_button, self.no_button):
            button.layout.display = "none"

    def _confirm(self) -> None:
        act = self._asked
        self.ask_nothing()
        if act is not None:
            act()

    def show_trials(
        self, facts: Sequence[Facts], best: Facts | None, metric: str, *, running: bool, on_stop: Callable[[int], None]
    ) -> None:
        """Write the rows, in this order; `on_stop` is told the number of the trial whose button was pressed."""
        settings = _trialtable.names(facts)
        widths = _trialtable.widths(facts, settings)
        self.head.value = _trialtable.head(settings, widths, metric)
        for one in facts:
            if one.number not in self.rows:
                stop = functools.partial(self._do, functools.partial(on_stop, one.number))
                self.rows[one.number] = Row(one.name, self._look, stop)
            self.rows[one.number].write(
                _trialtable.row(one, settings, widths, best),
                is_best=one is best,
                stoppable=running and one.state in ("running", "waiting"),
            )
        boxes = tuple(self.rows[one.number].box for one in facts)
        if self._table.children != boxes:
            self._table.children = boxes

    def show_parts(self, *, live: bool, more: bool) -> None:
        """Show the table and the charts, unless they stand where they are saved; `more` trials can be asked for."""
        hidden = {self.more_button: not more, self.controls: not self.charts.outputs}
        for part in self._live:
            show_if(part, live and not hidden.get(part, False))

    def draw(self, data: Mapping[str, Any], height: int) -> None:
        """Show a figure of so many pixels."""
        self.charts.layout.min_height = f"{height + 4}px"  # the old chart goes as the new one comes: hold the place
        self.charts.outputs = ({"output_type": "display_data", "data": data, "metadata": {}},)

    def draw_nothing(self) -> None:
        self.charts.layout.min_height = "0"
        self.charts.outputs = ()

    def dispose(self) -> None:
        """Give every widget back."""
        dispose(self.widget, *(row.box for row in self.rows.values()), *vars(self._look).values())

    def _button(self, text: str, tooltip: str = "") -> widgets.Button:
        return widgets.Button(description=text, tooltip=tooltip or None)


class Look:
    """Layouts that all rows share: each is a widget of its own."""

    def __init__(self) -> None:
        self.cells = widgets.Layout(flex="1 1 auto", min_width="0")
        self.place = widgets.Layout(flex="0 0 62px", width="62px")
        self.line = widgets.Layout(width="100%", align_items="center")
        self.shown, self.hidden = (widgets.Layout(visibility=seen) for seen in ("visible", "hidden"))


class Row:
    """A row of the table: the trial's facts, and a button that stops it."""

    def __init__(self, name: str, look: Look, on_stop: Act) -> None:
        self._look = look
        self._cells = widgets.HTML(layout=look.cells)
        self.stop_button = widgets.Button(description="Stop", tooltip=f"Stop trial {name}", layout=look.hidden)
        self.stop_button.add_class("nt-small")
        self.stop_button.on_click(lambda _: on_stop())
        place = widgets.Box([self.stop_button], layout=look.place)
        self.box = widgets.HBox([self._cells, place], layout=look.line)
        self.box.add_class("nt-trial")

    def write(self, html: str, *, is_best: bool, stoppable: bool) -> None:
        self._cells.value = html
        self.stop_button.layout = self._look.shown if stoppable else self._look.hidden
        (self.box.add_class if is_best else self.box.remove_class)("nt-best")
