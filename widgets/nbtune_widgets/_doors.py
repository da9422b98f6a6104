"""Panels of which one is open: a button for each, and the panel below them."""

from __future__ import annotations

from collections.abc import Mapping

import ipywidgets as widgets

from nbtune_widgets._frame import set_class
from nbtune_widgets._page import Host


class Doors:
    """Buttons in a line. A click opens a panel and closes the others; a second click closes it."""

    def __init__(self, panels: Mapping[str, widgets.DOMWidget], host: Host) -> None:
        self._panels = panels
        self._said = dict.fromkeys(panels, "")
        self.buttons = {name: widgets.ToggleButton() for name in panels}
        for name, button in self.buttons.items():
            button.observe(host.act(lambda name=name: self._turned(name)), names="value")
        line = widgets.HBox(list(self.buttons.values()), layout=widgets.Layout(flex_flow="row wrap"))
        line.add_class("nt-doors")
        for panel in panels.values():
            panel.add_class("nt-panel")
        self.widget = widgets.VBox([line, *panels.values()])
        self._draw()

    def open(self, name: str) -> None:
        """As a click on a closed door."""
        self.buttons[name].value = True

    def mark(self, name: str, said: str, *, wrong: bool = False) -> None:
        """Say on a door what is behind it."""
        self._said[name] = said
        set_class(self.buttons[name], "nt-wrong", on=wrong)
        self._draw()

    def _turned(self, name: str) -> None:
        if self.buttons[name].value:
            for other, button in self.buttons.items():
                if other != name:
                    button.value = False
        self._draw()

    def _draw(self) -> None:
        for name, button in self.buttons.items():
            said = f" · {self._said[name]}" if self._said[name] else ""
            button.description = f"{'▾' if button.value else '▸'} {name[0].upper()}{name[1:]}{said}"
            self._panels[name].layout.display = None if button.value else "none"
