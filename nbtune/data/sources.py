"""Where rows come from: Python objects, a file, a folder of files, a pasted text, a dataset of the hub."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbtune.data import formats
from nbtune.data.files import PROSE, READERS, parse, read_file
from nbtune.data.hub import read_hub
from nbtune.data.values import Row
from nbtune.errors import DataError
from nbtune.spec import DataSpec, SourceSpec

BUILT_IN = ("stdlib-docs",)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LONGEST_NAME = 1000  # characters of a source; what is longer is no name


def read(spec: SourceSpec, base_dir: Path | None, on_status: Callable[[str], None]) -> list[Row]:
    """All rows of `spec.source`, a relative path being looked up in `base_dir`. Raises DataError."""
    if spec.rows is not None:
        return [dict(row) for row in spec.rows]
    if spec.source.startswith("memory:"):
        raise DataError(
            "The rows of this data existed only in memory",
            f"{spec.source} is the hash of rows that were given as Python objects.",
            "Give the rows again, or save them to a .jsonl file and name it.",
        )
    path = _path(spec.source, base_dir)
    if path.is_file():
        return read_file(path)
    if path.is_dir():
        return _read_folder(path, spec)
    if _HUB_ID.fullmatch(spec.source) and path.suffix.lower() not in READERS:
        return read_hub(spec, on_status)
    raise _missing(spec.source, path)


def from_text(text: str, **settings: Any) -> DataSpec:
    """A spec over pasted rows: JSON, JSON lines, CSV with a line of column names, or else plain text.

    Raises DataError where the text is empty, or begins as JSON and is not.
    """
    rows = parse(text, "The pasted text")
    if not rows:
        raise DataError("The data is empty", "The pasted text has no rows.", "Paste at least one row.")
    return DataSpec.from_rows(rows, **settings)


def _path(source: str, base_dir: Path | None) -> Path:
    try:
        if len(source) > _LONGEST_NAME or "\n" in source:
            raise ValueError("it is too long, or has several lines")
        path = Path(source).expanduser()
        path = path if base_dir is None else base_dir / path
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a part of the name is too long, or ~ has no such user
        raise DataError(
            "The source of the data is no name", f"{source[:80]!r}: {error}.", "Name a file, a folder or a hub dataset."
        ) from error
    return path


def _read_folder(folder: Path, spec: SourceSpec) -> list[Row]:
    """The rows of all files of a folder; of its texts where it holds nothing else."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in READERS and file.name[0] != ".")
    files = [file for file in files if file.suffix.lower() not in PROSE] or files
    if not files:
        raise DataError(
            "The folder holds no data",
            f"In {folder} there is no file of the type {', '.join(READERS)}.",
            "Name another folder, or a file.",
        )
    rows: list[Row] = []
    first = None
    for file in files:
        found = read_file(file)
        columns = list(dict.fromkeys(column for row in found for column in row))
        form = formats.detect(columns).name if spec.format == "auto" and not spec.columns else spec.format
        first = first or form
        if form != first:
            raise DataError(
                "The files of the folder are not of one form",
                f"{files[0]} is {first}, {file} is {form}.",
                "Name one file, and mix in the others: data.mix.",
            )
        rows += found
    return rows


def _missing(source: str, path: Path) -> DataError:
    names = list(BUILT_IN)
    if path.parent.is_dir():
        names += [file.name for file in path.parent.iterdir() if file.suffix.lower() in READERS]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4)
    return DataError(
        "The data is not there",
        f"{path.absolute()} does not exist, and {source!r} is no built-in data and no hub id (owner/name).",
        f"Did you mean {' or '.join(near)}?" if near else "Check the name and the folder.",
    )
