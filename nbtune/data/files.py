"""Read the rows of a file or a text: JSON, JSON lines, CSV, Parquet, prose. Errors name the place and the line."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbtune.data.values import Row, kind
from nbtune.errors import DataError

PROSE = (".txt", ".md")
_WRAPPERS = ("data", "rows", "train")  # {"data": [...]}: names under which files keep their rows
_SECTION = 2000  # characters up to which paragraphs of a text are put together
_MEMORY_PER_BYTE = 8  # that rows take, read from a file
_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"PK\x03\x04": "a ZIP archive", b"\x1f\x8b": "gzip"}
_SAVE_AS = "Save the file as UTF-8 text."


def read_file(path: Path) -> list[Row]:
    """All rows of one file. Raises DataError naming the file, and the line where there is one."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"Files of the type {path.suffix or '(none)'} are not read",
            f"{path} is not one of {', '.join(READERS)}.",
            "Save the rows as .jsonl: one JSON object per line.",
        )
    try:
        _check_size(path)
        rows = reader(path)
    except OSError as error:
        raise DataError(
            "The data cannot be read", f"{path}: {error.strerror or error}.", "Check who may read it, and the disk."
        ) from error
    if not rows:
        raise DataError("The data is empty", f"{path} has no rows.", "Name a file with rows.")
    return rows


def parse(text: str, where: str) -> list[Row]:
    """The rows of a text: JSON, JSON lines, CSV with a line of column names, or else prose. Raises DataError."""
    text = text.removeprefix("\ufeff")
    if text.lstrip()[:1] in ("[", "{"):
        return _json(text, where)
    return _table(text, where) or _prose(text)


def _check_size(path: Path) -> None:
    import psutil

    size, free = path.stat().st_size, psutil.virtual_memory().available
    if size * _MEMORY_PER_BYTE > free:
        raise DataError(
            "The data does not fit into memory",
            f"{path} has {size / 1e9:.1f} GB, and its rows would take about {size * _MEMORY_PER_BYTE / 1e9:.0f} GB;"
            f" {free / 1e9:.1f} GB are free.",
            "Name a part of the file.",
        )


def _text(path: Path) -> str:
    data = path.read_bytes()
    for mark, name in _MARKS.items():
        if data.startswith(mark):
            raise DataError(
                "The data is not UTF-8 text", f"{path} begins as {name} does (byte 0x{data[0]:02x}, line 1).", _SAVE_AS
            )
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise DataError("The data is not text", f"{path}, line {line}: byte 0x00 stands in no text.", _SAVE_AS)
    try:
        return data.decode("utf-8-sig")  # with or without the mark that Windows programs put first
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            "The data is not UTF-8 text",
            f"{path}, line {line}: byte 0x{data[error.start]:02x} cannot be read.",
            _SAVE_AS,
        ) from error


def _json(text: str, where: str) -> list[Row]:
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _json_lines(text, where)  # JSON lines under the name .json, as many hub files are
        raise _broken_json(where, error.lineno, error) from error
    except (ValueError, RecursionError) as error:
        raise _unreadable_json(where, error) from error
    if isinstance(value, dict):
        wrapped = [value[name] for name in _WRAPPERS if isinstance(value.get(name), list)]
        value = wrapped[0] if len(wrapped) == 1 else [value]
    if not isinstance(value, list):
        raise _no_object(where, value)
    for number, row in enumerate(value, start=1):
        if not isinstance(row, dict):
            raise _no_object(f"{where}, row {number}", row)
    return value


def _json_lines(text: str, where: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand within a string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise _broken_json(where, number, error) from error
        except (ValueError, RecursionError) as error:
            raise _unreadable_json(f"{where}, line {number}", error) from error
        if not isinstance(row, dict):
            raise _no_object(f"{where}, line {number}", row)
        rows.append(row)
    return rows


def _csv(text: str, where: str) -> list[Row]:
    if not text.strip():
        return []
    delimiter = _delimiter(text)
    csv.field_size_limit(1 << 30)  # the limit of 128 kB is for a field; long texts are larger
    # Not a StringIO, which takes four bytes a letter; nor splitlines, for U+2028 may stand within a text.
    lines = (line + "\n" for line in (text if "\n" in text else text.replace("\r", "\n")).split("\n"))
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    rows = []
    try:
        names = reader.fieldnames or ()
        if twice := [name for name in names if list(names).count(name) > 1]:
            raise DataError(
                "Two columns of the data have one name",
                f"{where}, line 1: the column {twice[0]!r} is there {list(names).count(twice[0])} times.",
                "Rename all but one.",
            )
        for row in reader:
            if None in row:
                raise DataError(
                    "A line of the data has too many fields",
                    f"{where}, line {reader.line_num}: {len(row) - 1 + len(row[None])} fields, the first line names"
                    f" {len(row) - 1}.",
                    f'Put a text that holds "{delimiter}" in double quotes.',
                )
            rows.append(row)
    except csv.Error as error:
        raise DataError(
            "The data is not CSV",
            f"{where}, in the row that begins on line {reader.line_num + 1}: {error}.",
            "Close every double quote.",
        ) from error
    return rows


def _delimiter(text: str) -> str:
    return max(",;\t", key=text.partition("\n")[0].count)


def _table(text: str, where: str) -> list[Row]:
    """The rows of a pasted table; none where it is no table: prose has commas too."""
    if _delimiter(text) not in text.partition("\n")[0]:
        return []
    try:
        rows = _csv(text, where)
    except DataError:
        return []
    return [] if any(value is None for row in rows for value in row.values()) else rows


def _prose(text: str) -> list[Row]:
    """Paragraphs, where blank lines part them, or else lines; short neighbours are put together."""
    text = text.replace("\r\n", "\n").strip("\n")
    between = "\n\n" if re.search(r"\n[ \t]*\n", text) else "\n"
    parts = re.split(r"\n(?:[ \t]*\n)+", text) if between == "\n\n" else text.split("\n")
    sections: list[str] = []
    room = 0
    for part in (part for part in parts if part.strip()):
        if len(part) + len(between) <= room:
            sections[-1] += between + part
            room -= len(part) + len(between)
        else:
            sections.append(part)
            room = _SECTION - len(part)
    return [{"text": section} for section in sections]


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
        names = table.column_names
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError("Two columns of the data have one name", f"{path}: {twice[0]!r}.", "Rename all but one.")
        return table.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        text = str(error).strip() or type(error).__name__
        raise DataError("The data is not Parquet", f"{path}: {text}", "Write or download the file again.") from error


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".json": lambda path: _json(_text(path), str(path)),
    ".jsonl": lambda path: _json_lines(_text(path), str(path)),
    ".csv": lambda path: _csv(_text(path), str(path)),
    ".parquet": _read_parquet,
    ".txt": lambda path: _prose(_text(path)),
    ".md": lambda path: _prose(_text(path)),
}


def _broken_json(where: str, line: int, error: json.JSONDecodeError) -> DataError:
    return DataError(
        "The data is not JSON",
        f"{where}, line {line}, column {error.colno}: {error.msg}.",
        "Mend that line; every row must be one complete JSON object.",
    )


def _unreadable_json(where: str, error: Exception) -> DataError:
    deep = isinstance(error, RecursionError)
    return DataError(
        "The data is JSON that cannot be read",
        f"{where}: {'lists or objects are nested too deeply' if deep else 'a number has too many digits'}.",
        "Mend it; a row is an object with texts or with a list of messages.",
    )


def _no_object(where: str, row: Any) -> DataError:
    return DataError(
        "A row of the data is no object",
        f"{where}: it is {'null' if row is None else kind(row)}.",
        'Make every row an object such as {"prompt": "...", "completion": "..."}.',
    )
