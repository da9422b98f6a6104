"""Read rows: .json, .jsonl, .csv and .parquet files, and hub datasets. Errors name the file and the line."""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbtune.errors import DataError
from nbtune.spec import DataSpec

Row = dict[str, Any]

HUB_TIMEOUT = 5.0  # seconds until an unanswered look-up counts as no network
BUILT_IN = ("stdlib-docs",)
_WRAPPERS = ("data", "rows", "train")  # {"data": [...]}: names under which files keep their rows
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def read(spec: DataSpec, base_dir: Path | None, on_status: Callable[[str], None]) -> list[Row]:
    """All rows of `spec.source`, a relative path being looked up in `base_dir`. Raises DataError."""
    if spec.rows is not None:
        return [dict(row) for row in spec.rows]
    if spec.source.startswith("memory:"):
        raise DataError(
            "The rows of this data existed only in memory",
            f"{spec.source} is the hash of rows that were given as Python objects.",
            "Give the rows again, or save them to a .jsonl file and name it.",
        )
    path = Path(spec.source).expanduser()
    if base_dir is not None:
        path = base_dir / path
    if path.is_file():
        return read_file(path)
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix.lower() in _READERS)
        raise DataError(
            "The data is a folder",
            f"{path} holds {', '.join(files[:8]) or 'no data file'}.",
            f"Name one file: {path / files[0]}" if files else "Name a .json, .jsonl, .csv or .parquet file.",
        )
    if _HUB_ID.fullmatch(spec.source) and path.suffix.lower() not in _READERS:
        return _read_hub(spec, on_status)
    raise _missing(spec.source, path)


def read_file(path: Path) -> list[Row]:
    """All rows of one file. Raises DataError naming the file, and the line where there is one."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"Files of the type {path.suffix or '(none)'} are not read",
            f"{path} is not one of {', '.join(_READERS)}.",
            "Save the rows as .jsonl: one JSON object per line.",
        )
    try:
        rows = reader(path)
    except OSError as error:
        raise DataError(
            "The data cannot be read", f"{path}: {error.strerror or error}.", "Check who may read it, and the disk."
        ) from error
    if not rows:
        raise DataError("The data is empty", f"{path} has no rows.", "Name a file with rows.")
    return rows


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")  # with or without the mark that Windows programs put first
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            "The data is not UTF-8 text",
            f"{path}, line {line}: byte 0x{data[error.start]:02x} cannot be read.",
            "Save the file as UTF-8.",
        ) from error


def _read_json(path: Path) -> list[Row]:
    text = _text(path)
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _json_lines(path, text)  # JSON lines under the name .json, as many hub files are
        raise _broken_json(path, error.lineno, error) from error
    if isinstance(value, dict):
        wrapped = [value[name] for name in _WRAPPERS if isinstance(value.get(name), list)]
        value = wrapped[0] if len(wrapped) == 1 else [value]
    if not isinstance(value, list):
        raise _no_object(str(path), value)
    for number, row in enumerate(value, start=1):
        if not isinstance(row, dict):
            raise _no_object(f"{path}, row {number}", row)
    return value


def _read_jsonl(path: Path) -> list[Row]:
    return _json_lines(path, _text(path))


def _json_lines(path: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand within a string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise _broken_json(path, number, error) from error
        if not isinstance(row, dict):
            raise _no_object(f"{path}, line {number}", row)
        rows.append(row)
    return rows


def _read_csv(path: Path) -> list[Row]:
    text = _text(path)
    if not text.strip():
        return []
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    csv.field_size_limit(1 << 30)  # the limit of 128 kB is for a field; long texts are larger
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        for row in reader:
            if None in row:
                raise DataError(
                    "A line of the data has too many fields",
                    f"{path}, line {reader.line_num}: {len(row) - 1 + len(row[None])} fields, the first line names"
                    f" {len(row) - 1}.",
                    f'Put a text that holds "{delimiter}" in double quotes.',
                )
            rows.append(row)
    except csv.Error as error:
        raise DataError(
            "The data is not CSV", f"{path}, line {reader.line_num}: {error}.", "Close every double quote."
        ) from error
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError("The data is not Parquet", f"{path}: {error}", "Write or download the file again.") from error


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _broken_json(path: Path, line: int, error: json.JSONDecodeError) -> DataError:
    return DataError(
        "The data is not JSON",
        f"{path}, line {line}, column {error.colno}: {error.msg}.",
        "Mend that line; every row must be one complete JSON object.",
    )


def _no_object(where: str, row: Any) -> DataError:
    return DataError(
        "A row of the data is no object",
        f"{where}: {json.dumps(row)[:60]}",
        'Make every row an object such as {"prompt": "...", "completion": "..."}.',
    )


def _missing(source: str, path: Path) -> DataError:
    names = list(BUILT_IN)
    if path.parent.is_dir():
        names += [file.name for file in path.parent.iterdir() if file.suffix.lower() in _READERS]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4)
    return DataError(
        "The data is not there",
        f"{path.absolute()} does not exist, and {source!r} is no built-in data and no hub id (owner/name).",
        f"Did you mean {' or '.join(near)}?" if near else "Check the name and the folder.",
    )


# Hub datasets


def _read_hub(spec: DataSpec, on_status: Callable[[str], None]) -> list[Row]:
    import datasets

    name = spec.source
    on_status(f"Reading the dataset {name}")
    _look_up(name)
    try:
        table = datasets.load_dataset(name, split=spec.split)
    # `datasets` raises what its readers, pyarrow, fsspec and the hub's client raise; each is shown as it is.
    except Exception as error:
        text = str(error).strip().splitlines()
        raise DataError(
            f"The dataset {name} cannot be read",
            f"{type(error).__name__}: {text[0] if text else ''}",
            "Check its page on the hub for its splits and configurations, or download one of its files and name it.",
        ) from error
    rows = table.to_list()
    if not rows:
        raise DataError("The data is empty", f"The split {spec.split!r} of {name} has no rows.", "Name another split.")
    return rows


def _look_up(name: str) -> None:
    """Fail in seconds where the hub cannot be reached and the dataset is not in the local cache."""
    import datasets.config
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    folder = name.replace("/", "___")
    if (Path(datasets.config.HF_DATASETS_CACHE) / folder).is_dir():
        return
    if constants.is_offline_mode():
        raise _offline(name, "HF_HUB_OFFLINE is set, so it cannot be downloaded.")
    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT)
    except GatedRepoError as error:
        raise DataError(
            f"The dataset {name} is gated",
            "Its owner asks you to accept terms first.",
            f"Accept them on https://huggingface.co/datasets/{name}, then run `hf auth login`.",
        ) from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"There is no file and no hub dataset {name}",
            "",
            "Check the name. A private dataset needs a token: run `hf auth login`.",
        ) from error
    # The hub's client has changed its HTTP library twice (requests, httpx, httpx2) and passes that library's errors on.
    except Exception as error:
        raise _offline(name, f"{type(error).__name__}: {error}".splitlines()[0]) from error


def _offline(name: str, why: str) -> DataError:
    return DataError(
        f"There is no file {name}, and the dataset hub cannot be reached",
        why,
        "Check the path or the network, or use stdlib-docs, which needs neither.",
    )
