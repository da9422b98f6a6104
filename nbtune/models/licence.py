"""The licence of a model, as its own files state it: a GGUF's metadata, the head of its README, or its LICENSE."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

import yaml

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9  # types of a GGUF's values
_LONGEST = 1 << 20  # bytes of a text, and entries of a list, beyond which a header is not read on


def licence(folder: Path, gguf_file: str | None = None) -> str | None:
    """Its short name ("apache-2.0") or the first line of LICENSE; None where no file says."""
    if gguf_file is not None:
        return gguf_text(folder / gguf_file, "general.license")
    return _of_readme(folder / "README.md") or _of_text(folder)


def gguf_text(path: Path, wanted: str) -> str | None:
    """A text in the metadata of a GGUF, where it stands before its vocabulary; None where it does not."""
    with path.open("rb") as file:
        magic, _, _, count = struct.unpack("<4sIQQ", file.read(24))
        if magic != b"GGUF":
            return None
        try:
            for _ in range(count):
                key = _text(file)
                if key.startswith("tokenizer."):
                    return None
                value = _value(file, *struct.unpack("<I", file.read(4)))
                if key == wanted:
                    return str(value)
        except (struct.error, UnicodeDecodeError, KeyError):  # cut short, or of a version to come
            return None
    return None


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _text(file)
    if kind == _ARRAY:
        of, count = struct.unpack("<IQ", file.read(12))
        return [_value(file, of) for _ in range(_bounded(count))]
    code = "<" + _NUMBERS[kind]
    return struct.unpack(code, file.read(struct.calcsize(code)))[0]


def _text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    return file.read(_bounded(length)).decode("utf-8")


def _bounded(length: int) -> int:
    if length > _LONGEST:
        raise struct.error(f"{length} is no length")
    return length


def _of_readme(path: Path) -> str | None:
    """What the YAML between the first two lines of dashes says."""
    if not path.is_file():
        return None
    head, dashes, rest = path.read_text(encoding="utf-8", errors="replace").partition("---\n")
    if head.strip() or not dashes:
        return None
    try:
        facts = yaml.safe_load(rest.partition("\n---")[0])
    except yaml.YAMLError:
        return None
    if not isinstance(facts, dict) or not facts.get("license"):
        return None
    stated = facts["license"]
    stated = ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated)
    return str(facts.get("license_name") or stated) if stated == "other" else stated


def _of_text(folder: Path) -> str | None:
    for path in sorted(folder.glob("LICENSE*")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if first := next((line.strip() for line in lines if line.strip()), ""):
            return first[:80]
    return None
