"""Settings as fields of a dataclass: a default with its help and limits, by which a value is checked. No torch."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import operator
import re
import typing
from collections.abc import Sequence
from enum import Enum
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from nbtune.errors import AdapterError


def setting(
    default: Any = dataclasses.MISSING, help: str = "", *, factory: Any = dataclasses.MISSING, **metadata: Any
) -> Any:
    """A field with its help and more: label, unit, choices, pattern, ge, gt, le, lt, advanced, sweepable."""
    return dataclasses.field(default=default, default_factory=factory, metadata={"help": help, **metadata})


detail = functools.partial(setting, advanced=True)  # a setting that few people change


def pending(default: Any = None) -> Any:
    """A setting of PEFT that nbtune does not have yet: written to files at PEFT's default, refused at any other."""
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata={"pending": default})
    return dataclasses.field(default=default, metadata={"pending": default})


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """`Did you mean ...?` with the nearest of the known names, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=0.6)
    return f"Did you mean {', '.join(near)}?" if near else ""


def invalid(name: str, value: Any, must: str) -> AdapterError:
    """The error for a setting whose value cannot be right."""
    return AdapterError(f"Invalid {name}", f"{name} is {value!r}; it {must}.")


_LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}  # names of `operator`


def check(cls: type, field: dataclasses.Field[Any], value: Any) -> None:
    """Raise AdapterError where a field of a dataclass cannot have this value."""
    name, meta = field.name, field.metadata
    if "pending" in meta:
        # PEFT writes both null and an empty value for a setting that is not used.
        if value and value != meta["pending"]:
            remedy = "Leave it at its default, or use peft for this adapter."
            raise AdapterError(f"{name} is not there yet", f"{name} is {value!r}; nbtune cannot do this yet.", remedy)
        return
    choices = meta.get("choices")
    chosen = any(type(value) is type(choice) and value == choice for choice in choices or ())
    if choices is not None and not chosen and not re.fullmatch(meta.get("pattern", r"(?!)"), str(value)):
        raise invalid(name, value, f"must be one of {', '.join(map(repr, choices))}")
    try:
        _validator(cls, name).validate_python(value)
    except ValidationError as error:
        raise invalid(name, value, f"must be of type {field.type}") from error
    for key, words in _LIMITS.items():
        if key in meta and value is not None and not vars(operator)[key](value, meta[key]):
            raise invalid(name, value, f"must be {words} {meta[key]}")


@functools.cache
def _validator(cls: type, name: str) -> TypeAdapter[Any]:
    return TypeAdapter(typing.get_type_hints(cls)[name], config=ConfigDict(strict=True, allow_inf_nan=False))


def plain(value: Any) -> Any:
    """What JSON can carry: sets have no order and would change a file by themselves, so they are sorted."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


def check_regex(name: str, pattern: Any) -> None:
    """Raise AdapterError for a text that is no regular expression; lists of names are none."""
    try:
        re.compile(pattern if isinstance(pattern, str) else "")
    except re.error as error:
        raise invalid(name, pattern, f"must be a regular expression ({error})") from error
