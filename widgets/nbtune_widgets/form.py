"""A form made from `nbtune.spec.settings()`: one field a setting, with its help, its limits and its error beside it.

    fields = {setting.path: Field(setting) for setting in settings()}
    fields["training.max_steps"].value = 8      # as if a person had typed it
    group = Group("Training", list(fields.values()))

Nothing about a setting is written here: what is asked, how it is explained and what is allowed stand in `nbtune.spec`.
"""

from __future__ import annotations

import json
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from html import escape
from typing import Annotated, Any

import ipywidgets as widgets
import pydantic
import pydantic_core
import yaml
from ipywidgets.widgets.widget_bool import CheckboxStyle
from ipywidgets.widgets.widget_button import ButtonStyle
from ipywidgets.widgets.widget_description import DescriptionStyle
from ipywidgets.widgets.widget_string import HTMLStyle, TextStyle

from nbtune.spec import Setting

LABEL_WIDTH = "128px"
_NAMES = re.compile(r"[\w.-]+(\s*,\s*[\w.-]+)*,?")


class FieldError(ValueError):
    """What is in a field is no value of its setting."""


class Look:
    """Layouts and styles that the fields of one form share: a saved notebook holds the state of every single one.

    Args:
        width: Of every field; None has them as wide as what they hold.
    """

    def __init__(self, width: str | None = None) -> None:
        self.row = widgets.Layout(align_items="center", flex_flow="row wrap")
        self.help = widgets.Layout(flex="1 1 180px", min_width="160px")
        usual = ("250px", "290px", "430px")
        self.number, self.choice, self.line = (widgets.Layout(width=width or one) for one in usual)
        self.shown, self.hidden = (widgets.Layout(visibility=seen, width="28px") for seen in ("visible", "hidden"))
        self.html, self.button = HTMLStyle(), ButtonStyle()
        self.text = TextStyle(description_width=LABEL_WIDTH)
        self.check = CheckboxStyle(description_width=LABEL_WIDTH)
        self.description = DescriptionStyle(description_width=LABEL_WIDTH)

    @property
    def parts(self) -> list[widgets.Widget]:
        """All of them, to be given back: some are on no field yet."""
        return list(vars(self).values())


class Field:
    """One setting on the screen. `value` is the Python value; setting it, or typing, checks it and calls on_change."""

    def __init__(self, setting: Setting, look: Look | None = None) -> None:
        self.setting = setting
        self.error = ""
        self.on_change: Callable[[Field], None] = lambda _: None
        self._look = look = look or Look()
        self._adapter = pydantic.TypeAdapter(_limited(setting))
        self.control = _control(setting, look)
        self.control.observe(lambda _: self._changed(), names="value")
        self._help = widgets.HTML(layout=look.help, style=look.html)
        told = f"Back to the default, {_said(setting.default)}"
        self.reset = widgets.Button(description="↺", tooltip=told, layout=look.hidden, style=look.button)
        self.reset.add_class("nt-reset")
        self.reset.on_click(lambda _: self.set_default())
        self.widget = widgets.HBox([self.control, self.reset, self._help], layout=look.row)
        self.widget.add_class("nt-field")
        self.mark("")

    @property
    def value(self) -> Any:
        """The value of the setting. Raises FieldError with the reason where what was typed is none."""
        return self._parsed(self.control.value)

    @value.setter
    def value(self, value: Any) -> None:
        if isinstance(self.control, widgets.Text):
            self.control.value = _text(self._adapter.dump_python(value, mode="json"))
            return
        pattern, choices = self.setting.pattern, self.setting.choices or ()
        if isinstance(self.control, widgets.Dropdown) and pattern and re.fullmatch(pattern, str(value)):
            self.control.options = [(_choice(choice), choice) for choice in dict.fromkeys([*choices, value])]
        self.control.value = value

    def holds(self, value: Any) -> bool:
        """Whether this is its value."""
        try:
            return self.value == value
        except FieldError:
            return False

    def checked(self, value: Any) -> Any:
        """A plain value as one of its setting. Raises FieldError with the reason where it is none."""
        try:
            return self._adapter.validate_python(value)
        except pydantic.ValidationError as error:
            raise FieldError(_reason(error)) from error

    @property
    def changed(self) -> bool:
        """Whether it differs from the default; what cannot be read does."""
        return not self.holds(self.setting.default)

    def set_default(self) -> None:
        """As a click on the arrow beside it."""
        self.value = self.setting.default

    def offer(self, values: Sequence[str]) -> None:
        """Values to complete what is typed with; any other can be typed too."""
        assert isinstance(self.control, widgets.Combobox), f"{self.setting.path} is not a line of text"
        self.control.options = values

    def mark(self, reason: str) -> None:
        """Show why the value will not do; nothing takes the mark away."""
        self.error = reason
        unit = f"{escape(self.setting.unit)} · " if self.setting.unit else ""
        wrong = f'<div class="nt-invalid" role="alert">{escape(reason)}</div>' if reason else ""
        self._help.value = f'<div class="nt-help">{wrong}{unit}{escape(self.setting.help)}</div>'
        (self.control.add_class if reason else self.control.remove_class)("nt-bad")

    def _changed(self) -> None:
        self.reset.layout = self._look.shown if self.changed else self._look.hidden
        try:
            self._parsed(self.control.value)
        except FieldError as error:
            self.mark(str(error))
        else:
            self.mark("")
        self.on_change(self)

    def _parsed(self, shown: Any) -> Any:
        try:
            value = _read(shown.strip(), self.setting.type) if isinstance(self.control, widgets.Text) else shown
        except yaml.YAMLError as error:
            raise FieldError(f"Cannot be read: {str(error).splitlines()[0]}") from error
        return self.checked(value)


class Group:
    """Fields under each other: the basic ones, and the advanced ones behind a toggle that counts what was changed."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self.fields = list(fields)
        basic = [field.widget for field in fields if not field.setting.advanced]
        self._advanced = [field for field in fields if field.setting.advanced]
        self.toggle = widgets.ToggleButton(tooltip="Settings that rarely need a change")
        self.toggle.add_class("nt-link")
        self.toggle.observe(lambda _: self.refresh(), names="value")
        self._more = widgets.VBox([field.widget for field in self._advanced])
        self.widget = widgets.VBox([*basic, self.toggle, self._more])
        self.refresh()

    def refresh(self) -> None:
        """Say how many advanced settings differ from their defaults, and show them if asked or if one is wrong."""
        changed = sum(field.changed for field in self._advanced)
        opened = self.toggle.value or any(field.error for field in self._advanced)
        self.toggle.description = f"{'▾' if opened else '▸'} Advanced" + (f" ({changed} changed)" if changed else "")
        self.toggle.layout.display = None if self._advanced else "none"
        self._more.layout.display = None if opened else "none"


def _control(setting: Setting, look: Look) -> widgets.Dropdown | widgets.Checkbox | widgets.Text:
    """A list for choices, a box for yes and no, and a line of text for the rest: it takes 2e-4 and never clamps."""
    told = {"description": setting.label, "tooltip": setting.path}
    if setting.choices is not None:
        options = [(_choice(choice), choice) for choice in setting.choices]
        return widgets.Dropdown(
            options=options, value=setting.default, style=look.description, layout=look.choice, **told)  # fmt: skip
    if setting.type is bool:
        return widgets.Checkbox(value=setting.default, style=look.check, layout=look.choice, **told)
    line = widgets.Combobox if setting.type is str else widgets.Text  # a line that can be offered values
    return line(
        value=_text(setting.default), continuous_update=False, style=look.text, **told,
        placeholder="none" if _takes(setting.type, type(None)) else "",
        layout=look.number if setting.type in (int, float) else look.line)  # fmt: skip


def _choice(choice: Any) -> str:
    if isinstance(choice, bool | None):
        return {True: "yes", False: "no", None: "none"}[choice]
    return str(choice).replace("_", " ")


def _limited(setting: Setting) -> Any:
    """The setting's type with its limits, for pydantic to check."""
    limits = {name: getattr(setting, name) for name in ("ge", "gt", "le", "lt")}
    given = {name: limit for name, limit in limits.items() if limit is not None}
    return Annotated[setting.type, pydantic.Field(**given)] if given else setting.type


def _takes(annotation: Any, member: type) -> bool:
    """Whether a type is `member` or a union with it."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    parts = typing.get_args(annotation) if union else (annotation,)
    return any(part is member or typing.get_origin(part) is member for part in parts)


def _read(text: str, annotation: Any) -> Any:
    """What a person typed, as plain data: `q_proj, v_proj`, `0, 1, 2`, `q_proj: 4`; an empty line is none or empty."""
    if not text and _takes(annotation, type(None)):
        return None
    if _takes(annotation, dict) and (":" in text or not _takes(annotation, list)):
        return yaml.safe_load("{" + text.strip("{}") + "}")
    if _takes(annotation, list) or _takes(annotation, tuple):
        # One name is a list of one: as a text it would be a regular expression over whole paths.
        names = _NAMES.fullmatch(text) and text.lower() != "all-linear"
        if names or not _takes(annotation, str):
            return yaml.safe_load("[" + text.strip("[]") + "]")
    return text


def _said(value: Any) -> str:
    """A value in the words of the form, short."""
    text = _choice(value) if isinstance(value, bool | None) else _text(value) or "none"
    return text if len(text) < 40 else f"{text[:37]}..."


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | dict):
        plain = pydantic_core.to_jsonable_python(value)  # the steps of a recipe are models
        text = yaml.safe_dump(plain, default_flow_style=True, width=math.inf, sort_keys=False).strip()
        return (json.dumps(plain, ensure_ascii=False) if "\n" in text else text)[1:-1]  # JSON is YAML too
    return str(value)


_REASONS = {
    "int_parsing": "Must be a whole number",
    "int_from_float": "Must be a whole number",
    "float_parsing": "Must be a number",
}


def _reason(error: pydantic.ValidationError) -> str:
    """The first reason, in the words of a person."""
    first = error.errors()[0]
    return _REASONS.get(first["type"]) or first["msg"].replace("Input should", "Must").removeprefix("Value error, ")
