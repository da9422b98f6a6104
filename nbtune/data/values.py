"""What stands in a cell of a row: text, null, a list, or something that cannot be used."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

Row = dict[str, Any]

LONGEST = 10_000_000  # characters of one text; tokenising more would take minutes

_NULLS = ("NoneType", "NAType", "NaTType")
_KINDS = {
    "bool": "true or false",
    "dict": "an object",
    "float": "a number",
    "int": "a number",
    "list": "a list",
    "str": "text",
}


class Unusable(Exception):  # noqa: N818 - not an error of the program: the row is counted
    """Why a row cannot be used."""


def required_text(row: Mapping[str, Any], column: str) -> str:
    """The text of a column. Raises Unusable where it is missing, null or no text."""
    if column not in row:
        raise Unusable(f"`{column}` is missing")
    if is_null(row[column]):
        raise Unusable(f"`{column}` is null")
    return as_text(row[column], column)


def optional_text(row: Mapping[str, Any], column: str) -> str:
    """The text of a column, empty where there is none. Raises Unusable where it holds something else."""
    value = row.get(column)
    return "" if is_null(value) else as_text(value, column)


def as_text(value: Any, column: str) -> str:
    """A text or a number, such as the answer 42, as text."""
    if isinstance(value, str):
        return sound(value, f"`{column}`")
    if isinstance(value, numbers.Real) and not isinstance(value, bool):  # numpy's too
        try:
            return str(value)
        except ValueError as error:  # Python does not write integers of more than 4,300 digits
            raise Unusable(f"`{column}` is a number with too many digits") from error
    raise Unusable(f"`{column}` is {kind(value)}, not text")


def sound(text: str, where: str) -> str:
    """The same text. Raises Unusable where a tokenizer cannot read it or would take minutes."""
    if len(text) > LONGEST:
        raise Unusable(f"{where} has more than {LONGEST:,} characters")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"{where} holds half a character (U+{ord(text[error.start]):04X})") from error
    return text


def parsed(value: Any) -> Any:
    """A list or an object that a CSV or Parquet file carries as JSON text, or pandas as an array."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, str) and value.lstrip().startswith(("[{", "[]", "{")):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value  # a text that happens to begin so
    return value


def is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def is_null(value: Any) -> bool:
    """Whether there is no value: None, or what pandas writes for it."""
    return type(value).__name__ in _NULLS or (isinstance(value, float) and math.isnan(value))


def kind(value: Any) -> str:
    """What a value is, in words."""
    return _KINDS.get(type(value).__name__, f"a {type(value).__name__}")


def named(names: Iterable[str]) -> str:
    """Columns as they are named in a sentence."""
    return ", ".join(f"`{name}`" for name in names) or "(none)"
