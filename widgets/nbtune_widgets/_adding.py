"""The panel that adds trials to a sweep: values for the settings of its space, or more points at random."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets

from nbtune.errors import NbtuneError, SweepError
from nbtune.sweep.space import Point, Range, Space, draw, grid, read_values
from nbtune_widgets._style import notice

MANY = 200  # trials at once: more is a slip of the hand


class AddTrials:
    """A line for each setting of the space, and a number of random points.

    Args:
        space: Of the sweep.
        on_add: Told the points to add; may raise NbtuneError, which is shown.
        act: Makes a callback of a function: it is done on the thread that owns the widgets.
    """

    def __init__(
        self,
        space: Space,
        on_add: Callable[[list[Point]], None],
        act: Callable[[Callable[[], Any]], Callable[[Any], None]],
    ) -> None:
        self._space, self._on_add = space, on_add
        line = widgets.Layout(width="min(430px,100%)")
        self.fields = {
            name: widgets.Text(
                description=name.rsplit(".", 1)[-1], placeholder=said(values), layout=line,
                style={"description_width": "128px"})
            for name, values in space.items()
        }  # fmt: skip
        self.add_button = self._button("Add these", "nt-primary", act(self.add))
        self.count = widgets.BoundedIntText(value=4, min=1, max=MANY, layout=widgets.Layout(width="70px"))
        self.random_button = self._button("Add at random", "", act(self.add_random))
        self.cancel_button = self._button("Cancel", "", act(self.close))
        self.told = widgets.HTML()
        help_text = "Values with commas, or a range: 4, 8, 16 or 1e-5..1e-3 log 3. Every combination is tried once."
        random = widgets.HBox(
            [self.count, widgets.HTML("points of the space at random"), self.random_button],
            layout=widgets.Layout(align_items="center", flex_flow="row wrap"),
        )
        buttons = widgets.HBox([self.add_button, self.cancel_button])
        self.widget = widgets.VBox(
            [
                widgets.HTML(f'<div class="nt-help">{help_text}</div>'),
                *self.fields.values(),
                buttons,
                random,
                self.told,
            ],
            layout=widgets.Layout(display="none"),
        )
        for name in ("nt-ask", "nt-field"):
            self.widget.add_class(name)

    def _button(self, text: str, css: str, act: Callable[[Any], None]) -> widgets.Button:
        button = widgets.Button(description=text)
        button.add_class(css) if css else None
        button.on_click(act)
        return button

    def open(self, point: Point | None, tried: Sequence[Point]) -> None:
        """Show it, filled in with a point that was good; `tried` are not added again."""
        self._tried = list(tried)
        self.told.value = ""
        for name, field in self.fields.items():
            if not field.value and point is not None and name in point:
                field.value = str(point[name])
        self.widget.layout.display = None

    def close(self) -> None:
        self.widget.layout.display = "none"

    def add(self) -> None:
        """As a click on the button."""
        try:
            chosen = {name: read(name, field.value) for name, field in self.fields.items()}
            self._hand_on(grid(chosen))
        except NbtuneError as error:
            self.told.value = notice(str(error), "error")

    def add_random(self) -> None:
        """As a click on the button: the first points of the space that were not tried."""
        try:
            wanted = self.count.value
            points = draw(self._space, wanted + len(self._tried), seed=len(self._tried))
            self._hand_on([point for point in points if not self._is_tried(point)][:wanted])
        except NbtuneError as error:
            self.told.value = notice(str(error), "error")

    def _hand_on(self, points: list[Point]) -> None:
        new = [point for point in points if not self._is_tried(point)]
        if not new:
            raise SweepError("Nothing new to try", "The sweep has all of these trials.", "Give other values.")
        if len(new) > MANY:
            raise SweepError(f"{len(new):,} trials at once", f"At most {MANY} are added.", "Give fewer values.")
        self._on_add(new)
        self.close()

    def _is_tried(self, point: Point) -> bool:
        return any(all(known.get(name) == value for name, value in point.items()) for known in self._tried)


def read(name: str, text: str) -> list[Any] | Range:
    """What a person typed for a setting: `4, 8, 16`, `1e-5..1e-3 log 3`, or one value. Raises SweepError."""
    if not text.strip():
        raise SweepError(f"{name} has no value", "", "Give at least one.")
    _, values = read_values(f"{name}={compact(text)}")
    return values


def compact(text: str) -> str:
    """A range as a command line has it: `1e-5 .. 1e-3 log 3` is `1e-5..1e-3:log:3`."""
    text = text.strip()
    if ".." not in text or re.search(r"[\[\]{}'\",]", text):
        return text
    bounds = re.sub(r"\s*\.\.\s*", "..", text)
    return re.sub(r"[\s:]+", ":", bounds)


def said(values: Sequence[Any] | Range) -> str:
    """Values of a space as a person types them."""
    return str(values) if isinstance(values, Range) else ", ".join(map(str, values))
