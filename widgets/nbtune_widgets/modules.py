"""The module picker: kinds of modules by layers of the chosen model, chosen by kind, by layer or cell by cell.

picker = ModulePicker(on_pick=lambda choice: ...)
picker.show(describe(spec.model), places, all_linear)
picker.mark(paths, trainable=2_949_120)     # what the config really adapts, as `find_targets` says
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from html import escape
from typing import Any

import ipywidgets as widgets

from nbtune.models import ModelInfo
from nbtune_widgets._frame import set_class
from nbtune_widgets._page import replace
from nbtune_widgets._style import gigabytes
from nbtune_widgets.modulemap import Cell, ModuleMap
from nbtune_widgets.selection import Choice, Row, cells_of, rows_of, settings_of

PRESETS = ("attention", "MLP", "all linear", "upper half")


class ModulePicker:
    """Kinds down, layers across. A click tells `on_pick`; what is adapted comes back through `mark`.

    Args:
        on_pick: Told what the config has to say for the cells that are chosen now.
        act: Makes a callback of a function, one that keeps and shows its error.
    """

    def __init__(
        self, on_pick: Callable[[Choice], None], act: Callable[[Callable[[], Any]], Callable[[Any], None]]
    ) -> None:
        self.kinds: dict[str, widgets.Button] = {}
        self.version = 0  # counts clicks: an answer to an older one comes too late
        self._on_pick = on_pick
        self._act = act
        self._rows: list[Row] = []
        self._places: Collection[str] = ()
        self._all_linear: Collection[str] = ()
        self._parameters = 0
        self._layer_count = 0
        self._chosen: dict[int, set[int]] = {}
        self._lines: list[widgets.HTML] = []
        self._marking = False
        self.map = ModuleMap(lambda cells, on: act(lambda: self.paint(cells, on=on))(None))
        self.map.observe(lambda _: self._show_the_right_one(), names="ready")
        self.presets = {name: widgets.Button(description=name) for name in PRESETS}
        for name, button in self.presets.items():
            button.on_click(act(lambda name=name: self.preset(name)))
        self.layers = widgets.IntRangeSlider(
            description="layers", min=0, max=1, value=(0, 1), continuous_update=False,
            layout=widgets.Layout(width="100%"), style={"description_width": "104px"})  # fmt: skip
        self.layers.add_class("nt-layers")
        self.layers.observe(act(self._slid), names="value")
        self._plain_rows = widgets.VBox()
        self.plain = widgets.VBox([self._plain_rows, self.layers])
        self.summary = widgets.HTML()
        heading = widgets.HTML('<div class="nt-heading">Target modules</div>', layout=widgets.Layout(flex="1 1 auto"))
        top = widgets.HBox([heading, *self.presets.values()], layout=widgets.Layout(flex_flow="row wrap"))
        top.add_class("nt-presets")
        self.choosing = widgets.VBox([top, self.map, self.plain])
        self.widget = widgets.VBox([self.choosing, self.summary])

    def show(self, info: ModelInfo, places: Collection[str], all_linear: Collection[str]) -> None:
        """Draw the map of this model's blocks.

        Args:
            info: What its linear layers are.
            places: The paths of all its modules.
            all_linear: The paths that "all-linear" means.
        """
        self._rows = rows_of(info.modules)
        self._places, self._all_linear = places, all_linear
        self._parameters = info.parameters
        self._layer_count = 1 + max((layer for row in self._rows for layer in row.modules), default=0)
        self._chosen = {}
        self.kinds = {row.label: widgets.Button(description=row.label) for row in self._rows}
        self._lines = [widgets.HTML(layout=widgets.Layout(flex="1 1 auto", min_width="0")) for _ in self._rows]
        lines = [_line_of(widgets.HTML(), _ruler(self._layer_count), "")]
        for index, (row, line) in enumerate(zip(self._rows, self._lines, strict=True)):
            button = self.kinds[row.label]
            button.add_class("nt-kind")
            button.on_click(self._act(lambda index=index: self.toggle(index)))
            lines.append(_line_of(button, line, row.shape))
        replace(self._plain_rows, lines)
        self._marking = True
        self.layers.max = self._layer_count - 1
        self.layers.value = (0, self._layer_count - 1)
        self._marking = False
        self._draw()

    def mark(self, paths: Collection[str], trainable: int, trained_bytes: int, version: int | None = None) -> None:
        """Show which modules are adapted, and what that costs.

        Args:
            paths: Of the adapted modules.
            trainable: The number of trained parameters.
            trained_bytes: What these take in memory, with their gradients and the optimiser's averages.
            version: `version` when this was asked for; nothing is shown where there were clicks since.
        """
        if version is not None and version != self.version:
            return
        self._chosen = cells_of(self._rows, paths)
        chosen = sum(len(self._rows[index].modules[layer]) for index, layer in self._cells())
        every = sum(len(names) for row in self._rows for names in row.modules.values())
        self._draw()
        share = f" ({100 * trainable / self._parameters:.2g} %)" if self._parameters else ""
        outside = len(set(paths)) - chosen
        more = f" and {outside} outside the layers" if outside > 0 else ""
        what = f"{chosen} of {every} modules{more} · " if chosen else f"{outside} modules · " if outside > 0 else ""
        self.summary.value = (
            f'<div class="nt-b">{what}{trainable:,} trainable parameters{share}</div>'
            f'<div class="nt-soft nt-small">{gigabytes(trained_bytes)} with their gradients and the optimiser</div>'
        )

    def refuse(self, reason: str) -> None:
        """Say why the choice adapts nothing."""
        self.summary.value = f'<div class="nt-invalid" role="alert">{escape(reason)}</div>'

    def paint(self, cells: Iterable[Cell], *, on: bool) -> None:
        """As clicks on single cells: (index of the row, number of the layer)."""
        chosen = {index: set(layers) for index, layers in self._chosen.items()}
        for index, layer in cells:
            if layer in self._rows[index].modules:
                (chosen.setdefault(index, set()).add if on else chosen.setdefault(index, set()).discard)(layer)
        self._choose(chosen)

    def toggle(self, index: int) -> None:
        """As a click on the name of a plain row: in the layers of the slider, or not at all."""
        chosen = {row: set(layers) for row, layers in self._chosen.items()}
        chosen[index] = set() if chosen.get(index) else self._in_range(index)
        self._choose(chosen)

    def preset(self, name: str) -> None:
        """As a click on one of the buttons above the map."""
        if name == "upper half":
            half = self._layer_count // 2
            rows = [index for index, layers in self._chosen.items() if layers] or range(len(self._rows))
            self._choose({index: {n for n in self._rows[index].modules if n >= half} for index in rows})
            return
        attention = {index for index, row in enumerate(self._rows) if _in_attention(row)}
        every = set(range(len(self._rows)))
        rows = {"attention": attention, "MLP": every - attention}.get(name, every) or every
        self._choose({index: set(self._rows[index].modules) for index in rows})

    def _slid(self) -> None:
        if not self._marking:
            self._choose({index: self._in_range(index) for index, layers in self._chosen.items() if layers})

    def _in_range(self, index: int) -> set[int]:
        first, last = self.layers.value
        return {layer for layer in self._rows[index].modules if first <= layer <= last}

    def _choose(self, chosen: dict[int, set[int]]) -> None:
        self.version += 1
        if not any(chosen.values()):
            self.refuse("At least one module has to be adapted.")
            self._draw()
            return
        self._chosen = chosen
        self._on_pick(settings_of(self._rows, chosen, self._places, self._all_linear))

    def _cells(self) -> list[Cell]:
        return [(index, layer) for index, layers in self._chosen.items() for layer in layers]

    def _draw(self) -> None:
        """Show the chosen cells on the map and in the plain rows."""
        numbers = [layer for _, layer in self._cells()]
        shown = []
        for index, (row, line) in enumerate(zip(self._rows, self._lines, strict=True)):
            layers = self._chosen.get(index, set())
            states = ["." if n not in row.modules else str(int(n in layers)) for n in range(self._layer_count)]
            shown.append({"label": row.label, "shape": row.shape, "cells": "".join(states)})
            line.value = _line(row.label, states)
            set_class(self.kinds[row.label], "nt-on", on=bool(layers))
        self.map.show(shown, self._layer_count)
        self._marking = True
        if numbers:
            self.layers.value = (min(numbers), max(numbers))
        self._marking = False
        self._show_the_right_one()

    def _show_the_right_one(self) -> None:
        self.plain.layout.display = "none" if self.map.ready else None


def _in_attention(row: Row) -> bool:
    return any("attn" in part or "attention" in part for part in row.rest.split(".")[:-1])


def _line_of(name: widgets.DOMWidget, cells: widgets.HTML, shape: str) -> widgets.HBox:
    name.layout.width = "104px"
    size = widgets.HTML(f'<span class="nt-soft nt-small">{shape}</span>', layout=widgets.Layout(width="84px"))
    row = widgets.HBox([name, cells, size], layout=widgets.Layout(align_items="center"))
    row.add_class("nt-kinds")
    return row


def _line(label: str, states: Sequence[str]) -> str:
    looks = {"1": ' class="nt-on"', "0": "", ".": ' class="nt-none"'}
    cells = "".join(f'<i{looks[state]} title="{label}, layer {n}"></i>' for n, state in enumerate(states))
    told = f"{label}: {states.count('1')} of {len(states) - states.count('.')} layers"
    return f'<div class="nt-cells" role="img" aria-label="{told}">{cells}</div>'


def _ruler(layers: int) -> widgets.HTML:
    every = 5 if layers <= 40 else 10
    numbers = "".join(f"<b>{n if n % every == 0 else ''}</b>" for n in range(layers))
    return widgets.HTML(
        f'<div class="nt-cells" aria-hidden="true">{numbers}</div>',
        layout=widgets.Layout(flex="1 1 auto", min_width="0"),
    )
