"""Data that is near: files beside the notebook, and tables among its variables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from IPython.core.getipython import get_ipython

FILES = 200
FOLDERS = 200  # that are looked into
DEPTH = 2  # folders below the notebook
_SKIPPED = {"node_modules", "__pycache__", "runs", "mlruns", "site-packages"}
_TABLES = {("pandas", "DataFrame"), ("datasets", "Dataset")}


def data_files(folder: Path, near: str | None = None) -> list[str]:
    """Data files of a folder and those below it, relative to it; and those beside the path `near`, absolute or not."""
    inner = islice(_folders(folder, DEPTH), FOLDERS)
    found = [str(path.relative_to(folder)) for path in islice((file for f in inner for file in _files(f)), FILES)]
    if near:
        typed = Path(near).expanduser()
        beside = typed if typed.is_dir() else typed.parent
        if beside != Path() and beside.is_dir():
            found += [str(path) for path in islice(_files(beside), FILES)]
    return list(dict.fromkeys(found))


def tables() -> dict[str, Any]:
    """Variables of the notebook that are rows: DataFrames, datasets and lists of dicts, by name."""
    return {name: value for name, value in _variables().items() if not name.startswith("_") and _is_table(value)}


def _variables() -> dict[str, Any]:
    shell = get_ipython()
    return {} if shell is None else dict(shell.user_ns)


def _files(folder: Path) -> Iterator[Path]:
    from nbtune.data.files import READERS

    for entry in _entries(folder):
        if entry.is_file() and Path(entry.name).suffix.lower() in READERS:
            yield Path(entry.path)


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    """The folder itself and those below it."""
    yield folder
    if depth:
        for entry in _entries(folder):
            if entry.is_dir(follow_symlinks=False) and entry.name not in _SKIPPED:
                yield from _folders(Path(entry.path), depth - 1)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, by name, without what is hidden; nothing where it may not be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name.lower())
    except OSError:
        return []


def _is_table(value: Any) -> bool:
    kind = type(value)
    if (kind.__module__.partition(".")[0], kind.__name__) in _TABLES:
        return len(value) > 0
    return kind is list and bool(value) and all(isinstance(row, dict) for row in value[:5])
