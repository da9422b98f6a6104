"""The Training step: presets, and the settings of training and tracking."""

from __future__ import annotations

import ipywidgets as widgets

from nbtune.presets import PRESETS
from nbtune.spec import RunSpec
from nbtune_widgets._frame import set_class
from nbtune_widgets._page import Host
from nbtune_widgets.specform import FULL, SpecForm


class TrainingPage:
    """Buttons of presets above the form; the one whose settings are all there is marked."""

    def __init__(self, form: SpecForm, host: Host) -> None:
        self._form = form
        self._host = host
        self.presets = {
            name: host.button(f"{name.capitalize()}\n{preset.help}", lambda name=name: self.use(name))
            for name, preset in PRESETS.items()
        }
        for button in self.presets.values():
            button.add_class("nt-method")
        heading = widgets.HTML('<div class="nt-heading">Presets</div>')
        cards = widgets.HBox(list(self.presets.values()), layout=widgets.Layout(flex_flow="row wrap"))
        cards.add_class("nt-wide")
        tracking = widgets.HTML('<div class="nt-heading">Tracking</div>', layout=widgets.Layout(margin="8px 0 0"))
        groups = form.groups
        self.widget = widgets.VBox([heading, cards, groups["training"].widget, tracking, groups["tracking"].widget])

    def use(self, name: str) -> None:
        """As a click on a preset."""
        preset = PRESETS[name].changes("full" if self._form.method == FULL else self._form.method.lower())
        self._host.change(preset, name.capitalize())

    def refresh(self, spec: RunSpec) -> None:
        """Mark the presets that change nothing: their settings are all there."""
        for name, button in self.presets.items():
            set_class(button, "nt-on", on=spec.preset(name) == spec)
