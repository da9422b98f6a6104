"""A list to edit: lines that are added, moved and taken away, each of them settings with a value of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import ipywidgets as widgets
import pydantic

from nbtune.spec import Setting, model_settings
from nbtune_widgets._page import Host
from nbtune_widgets.form import Field, FieldError, Look
from nbtune_widgets.live import dispose


class Line:
    """One item: the settings of a pydantic model in a panel that opens, and buttons to move it and take it away.

    Args:
        cls: The model.
        values: Of its settings; others are at their defaults.
        names: The settings to show, in this order; all where none are named.
    """

    def __init__(
        self, cls: type[pydantic.BaseModel], values: dict[str, Any], host: Host, names: Sequence[str] = ()
    ) -> None:
        self.cls = cls
        self._given = values
        self._touched = bool(values)  # before, nothing is wrong yet
        self._look = Look()
        found = {setting.name: setting for setting in model_settings("item", cls) if not _is_kind(setting)}
        self.fields = {name: Field(found[name], self._look) for name in names or found}
        for name, field in self.fields.items():
            if values.get(name) is not None:
                field.value = values[name]
            field.on_change = lambda _: self._changed()
        self.on_change: Callable[[], None] = lambda: None
        self.on_move: Callable[[int], None] = lambda _: None
        self.on_remove: Callable[[], None] = lambda: None
        self.title = widgets.HTML(layout=widgets.Layout(flex="1 1 240px", min_width="0"))
        self.edit = widgets.ToggleButton(description="edit", tooltip="Show its settings")
        self.edit.observe(lambda _: self._show(), names="value")
        self.up = host.button("↑", lambda: self.on_move(-1), "Earlier")
        self.down = host.button("↓", lambda: self.on_move(1), "Later")
        self.remove = host.button("✕", lambda: self.on_remove(), "Take it away")  # noqa: PLW0108 - set later
        head = widgets.HBox(
            [self.title, self.edit, self.up, self.down, self.remove], layout=widgets.Layout(flex_flow="row wrap")
        )
        head.add_class("nt-line")
        self.wrong = widgets.HTML()
        self.panel = widgets.VBox([*(field.widget for field in self.fields.values()), self.wrong])
        self.widget = widgets.VBox([head, self.panel])
        self.widget.add_class("nt-steprow")
        self._show()

    @property
    def value(self) -> pydantic.BaseModel | None:
        """What the line says; None, and the reason shown, where that is nothing yet."""
        try:
            given = {name: field.value for name, field in self.fields.items()}
            value = self.cls.model_validate({**self._given, **given})
        except FieldError:
            self._say("")  # said at the field
            return None
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            self._say(first["msg"].removeprefix("Value error, "))
            return None
        self._say("")
        return value

    def close(self) -> None:
        """Give the widgets back."""
        dispose(self.widget, *self._look.parts)

    def _changed(self) -> None:
        self._touched = True
        self.on_change()

    def _say(self, reason: str) -> None:
        reason = reason if self._touched else ""
        self.wrong.value = f'<div class="nt-invalid" role="alert">{escape(reason)}</div>' if reason else ""

    def _show(self) -> None:
        self.panel.layout.display = None if self.edit.value else "none"


def _is_kind(setting: Setting) -> bool:
    """Whether it says only which kind of item this is."""
    return setting.choices is not None and len(setting.choices) == 1


class Lines:
    """Lines under each other. `on_change` gets the values of those that have one, in order."""

    def __init__(self, on_change: Callable[[list[pydantic.BaseModel]], None], empty: str) -> None:
        self._on_change = on_change
        self._empty = widgets.HTML(f'<div class="nt-soft nt-small">{empty}</div>')
        self.lines: list[Line] = []
        self._box = widgets.VBox()
        self.widget = widgets.VBox([self._empty, self._box])

    @property
    def values(self) -> list[pydantic.BaseModel]:
        return [value for line in self.lines if (value := line.value) is not None]

    def fill(self, lines: Sequence[Line]) -> None:
        """Show other lines in place of these."""
        former, self.lines = self.lines, []
        for line in lines:
            self._take(line)
        self._draw()
        for line in former:
            line.close()

    def add(self, line: Line) -> None:
        """One more at the end, open."""
        line.edit.value = True
        self._take(line)
        self._draw()
        self._tell()

    def move(self, line: Line, by: int) -> None:
        """As a click on one of its arrows."""
        place = self.lines.index(line)
        self.lines.remove(line)
        self.lines.insert(max(0, place + by), line)
        self._draw()
        self._tell()

    def remove(self, line: Line) -> None:
        """As a click on its cross."""
        self.lines.remove(line)
        self._draw()
        line.close()
        self._tell()

    def _take(self, line: Line) -> None:
        line.on_change = self._tell
        line.on_move = lambda by: self.move(line, by)
        line.on_remove = lambda: self.remove(line)
        self.lines.append(line)

    def _draw(self) -> None:
        self._box.children = [line.widget for line in self.lines]
        self._empty.layout.display = "none" if self.lines else None
        for place, line in enumerate(self.lines):
            line.up.disabled = place == 0
            line.down.disabled = place == len(self.lines) - 1

    def _tell(self) -> None:
        self._on_change(self.values)
