"""The widgets of a live view and what shows where: progress, buttons, charts, how they are drawn, what unfolds."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

import ipywidgets as widgets

from nbtune_widgets import charts
from nbtune_widgets._style import chip, style

_WRAP = {"align_items": "center", "width": "100%", "flex_flow": "row wrap"}
_RIGHT = {"align_items": "center", "margin": "0 0 0 auto"}  # also where it comes to stand in a second line


class Board:
    """One card. It knows of no run.

    Args:
        name: The run's, shown large.
        title: Its full id, seen under the pointer.
        setting: What it trains, in a few words.
    """

    def __init__(self, name: str, title: str, setting: str) -> None:
        grow = widgets.Layout(flex="1 1 auto", min_width="0")
        self.header = widgets.HTML(layout=grow)
        self.name_it(name, title, setting)
        self.status = widgets.HTML(layout=widgets.Layout(flex="0 1 auto"))
        self.pause_button = widgets.Button(description="Pause", tooltip="Wait after this step; memory stays in use")
        self.stop_button = widgets.Button(description="Stop", tooltip="End after this step; the run can be resumed")
        self.resume_button = widgets.Button(description="Resume", tooltip="Go on from where it is")
        self.bar = widgets.FloatProgress(
            min=0, max=1, layout=widgets.Layout(width="100%", height="8px", margin="8px 0 4px")
        )
        self.bar.add_class("nt-bar")
        self.notice = widgets.HTML(layout=widgets.Layout(display="none"))
        self.charts = widgets.Output(layout=widgets.Layout(width="100%"))
        right = widgets.HBox(
            [self.status, self.pause_button, self.resume_button, self.stop_button], layout=widgets.Layout(**_RIGHT)
        )
        top = widgets.HBox([self.header, right], layout=widgets.Layout(**_WRAP))
        self.folds = {
            "samples": Fold("samples", "What the model answers at each evaluation"),
            "log": Fold("log", "The last lines of the run's log"),
            "spec": Fold("spec", "Exactly what this run was told"),
        }
        toggles = widgets.HBox([fold.toggle for fold in self.folds.values()], layout=widgets.Layout(**_RIGHT))
        self.controls = widgets.HBox([*self._view_controls(), toggles], layout=widgets.Layout(**_WRAP))
        self.controls.add_class("nt-controls")
        unfolded = [fold.content for fold in self.folds.values()]
        self.widget = widgets.VBox([style(), top, self.bar, self.notice, self.charts, self.controls, *unfolded])
        for css in ("nbtune", "nt-card"):
            self.widget.add_class(css)

    def name_it(self, name: str, title: str, setting: str) -> None:
        """Show another name."""
        shown = f'<span class="nt-name" title="{escape(title)}">{escape(name)}</span>'
        self.header.value = f'<div class="nt-row">{shown}{chip(setting)}</div>'

    @property
    def view(self) -> charts.View:
        """What the view controls say."""
        return charts.View(self.window.value or None, self.log_scale.value, self.smoothing.value)

    def say(self, html: str) -> None:
        """Show something under the bar, or nothing."""
        self.notice.value = html
        self.notice.layout.display = None if html else "none"

    def on_look(self, act: Callable[[], None]) -> None:
        """Call `act` when what is to be seen has changed."""
        for control in (self.window, self.smoothing, self.log_scale, self.freeze):
            control.observe(lambda _: act(), names="value")
        for fold in self.folds.values():
            fold.toggle.observe(lambda _: act(), names="value")

    def _view_controls(self) -> list[widgets.Widget]:
        narrow = {"description_width": "initial"}
        self.window = widgets.Dropdown(  # all is 0: a Dropdown takes None for "nothing is chosen" and shows nothing
            options=[("all steps", 0), ("last 50", 50), ("last 200", 200), ("last 1,000", 1000)],
            description="window", style=narrow, layout=widgets.Layout(width="136px"))  # fmt: skip
        self.smoothing = widgets.FloatSlider(
            value=charts.View.smoothing, min=0, max=0.99, step=0.01, description="smoothing", continuous_update=False,
            style=narrow, layout=widgets.Layout(width="160px"))  # fmt: skip
        self.log_scale, self.freeze = (_check_box(name) for name in ("log scale", "freeze"))
        self.freeze.tooltip = "Keep the charts still, to zoom and to read"
        return [self.window, self.smoothing, self.log_scale, self.freeze]


class Fold:
    """A link that opens a piece of HTML under the card."""

    def __init__(self, name: str, tooltip: str) -> None:
        self.name = name
        self.toggle = widgets.ToggleButton(tooltip=tooltip, layout=widgets.Layout(margin="0"))
        self.toggle.add_class("nt-link")
        self.content = widgets.HTML(layout=widgets.Layout(display="none"))
        self.show("", lambda: "")

    def show(self, count: str, html: Callable[[], str]) -> None:
        """`count` stands behind the name; `html` is made only where it is open."""
        opened = self.toggle.value
        self.toggle.description = f"{'▾' if opened else '▸'} {self.name}{f' ({count})' if count else ''}"
        self.content.layout.display = None if opened else "none"
        if opened:
            self.content.value = html()


def show_if(widget: widgets.DOMWidget, condition: bool) -> None:
    widget.layout.display = None if condition else "none"


def _check_box(name: str) -> widgets.Checkbox:
    return widgets.Checkbox(description=name, indent=False, layout=widgets.Layout(width="auto", margin="2px"))
