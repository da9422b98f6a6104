"""What the parts of a row are made of: a column, or a text with columns in braces.

    made_of({"prompt": "{question} {context}", "completion": "answer"}, row)

Braces hold a column's name and nothing else, so a template reads columns and cannot do anything; `{{` is a brace.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from nbtune.data.values import as_text, is_null, named
from nbtune.errors import DataError

_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


def check(mapping: Mapping[str, str], columns: Iterable[str]) -> None:
    """Raise DataError where a mapping names a column that the rows do not have."""
    columns = list(columns)
    for part, made_from in mapping.items():
        if made_from in columns:
            continue
        names = [match[1] for match in _BRACES.finditer(made_from) if match[1] is not None]
        unknown = [name for name in names if name not in columns] if names else [made_from]
        if unknown:
            raise DataError(
                f"There is no column {unknown[0]!r}",
                f"data.columns makes {part} from {made_from!r}; the rows have the columns {named(columns)}.",
                "Name one of them, or put several into a text in braces: '{question} {context}'.",
            )


def made_of(mapping: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of one row. Nulls within a text are empty; a part of which every column is null is null."""
    return {part: row.get(source) if source in row else _filled(source, row) for part, source in mapping.items()}


def _filled(template: str, row: Mapping[str, Any]) -> str | None:
    names = [match[1] for match in _BRACES.finditer(template) if match[1] is not None]
    if all(is_null(row.get(name)) for name in names):
        return None

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name is None:
            return match[0][0]
        return "" if is_null(row.get(name)) else as_text(row[name], name)

    return _BRACES.sub(fill, template)
