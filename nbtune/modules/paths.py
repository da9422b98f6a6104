"""Paths of modules such as model.layers.0.mlp.up_proj: what names, patterns and numbers of blocks mean, as in PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def ends_with(path: str, names: Sequence[str]) -> bool:
    """Whether a path is one of the names, or ends in one of them at a dot."""
    return path in names or path.endswith(tuple(f".{name}" for name in names))


def of_end(pattern: str, path: str) -> bool:
    """Whether a regular expression matches a path, or its end from a dot on."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def of_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module path, or the default."""
    return next((value for pattern, value in patterns.items() if of_end(pattern, path)), default)


def in_layers(path: str, layers: list[int] | int | None, patterns: list[str] | str | None) -> bool:
    """Whether a path is in one of the blocks of these numbers, counted in the lists of these names."""
    if layers is None or layers == []:
        return True
    # The first number counts: a later one is that of an expert in its block.
    names = [patterns] if isinstance(patterns, str) else patterns or []
    searches = [rf"(?:^|.*?\.){name}\.(?P<index>\d+)\." for name in names] or [r".*?\.[^.]*\.(?P<index>\d+)\."]
    match = next((match for search in searches if (match := re.match(search, path))), None)
    return match is not None and int(match["index"]) in ([layers] if isinstance(layers, int) else layers)


def shortest_names(paths: list[str], places: Iterable[str]) -> list[str]:
    """The fewest endings of paths that mean these of all paths and no others, so that a config stays readable."""
    wanted = set(paths)
    taken = {ending for path in places if path not in wanted for ending in _endings(path)}
    return sorted({next((ending for ending in _endings(path) if ending not in taken), path) for path in paths})


def _endings(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
