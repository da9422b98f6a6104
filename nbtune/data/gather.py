"""The rows of a spec's source and of those mixed in, each recognised by itself and converted to chats."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nbtune.data import formats, mapping, sources, stdlib_docs
from nbtune.data.formats import Chat, Converted, Form
from nbtune.data.recipe import Table, draw
from nbtune.data.values import Row
from nbtune.errors import DataError
from nbtune.spec import DataSpec, SourceSpec

_STDLIB = Form("messages", "made here from Python's own documentation", {})


@dataclasses.dataclass
class Gathered:
    """Every row that was read, one source after the other; a row's number is its place among them, from 1."""

    form: Form  # of the first source
    raw: list[Row]
    starts: dict[int, str]  # number of a source's first row -> the source
    table: Table  # what there is to train on so far
    left_out: dict[str, list[int]]  # reason -> numbers
    notes: list[str]  # what a person should know


def gather(spec: DataSpec, base_dir: Path | None, on_status: Callable[[str], None]) -> Gathered:
    """Read the source of `spec` and draw from those mixed in.

    Raises DataError where one is missing, empty, damaged or of no known form.
    """
    raw, form, converted = _read(spec, 1, base_dir, on_status)
    found = Gathered(form, raw, {1: _name(spec.source)}, Table(dict(enumerate(raw, 1)), {}, {}), {}, [])
    _add(found, converted)
    count = len(raw)
    for place, mixed in enumerate(spec.mix):
        start = len(found.raw) + 1
        raw, _, converted = _read(mixed, start, base_dir, on_status)
        name = _name(mixed.source)
        found.raw += raw
        found.starts[start] = name
        found.table.rows |= dict(enumerate(raw, start))
        _add(found, converted)
        if mixed.weight is None:
            continue
        wanted = round(mixed.weight * count)
        there = [number for number in found.table.numbers if number >= start]
        if wanted > len(there):
            found.notes.append(f"{name} has {len(there):,} rows of the {wanted:,} that its weight asks for")
        drawn = set(draw(there, wanted, f"nbtune:mix:{spec.seed}:{place}"))
        rest = [number for number in there if number not in drawn]
        found.table.drop(rest)
        found.left_out.setdefault(f"not drawn from {name}", []).extend(rest)
    return found


def _name(source: str) -> str:
    """A source in few letters: a file without its folders."""
    return Path(source).name if Path(source).is_absolute() else source


def _add(found: Gathered, converted: Converted) -> None:
    found.table.chats |= converted.chats
    for kept, new in ((found.table.unusable, converted.unusable), (found.left_out, converted.left_out)):
        for reason, numbers in new.items():
            kept.setdefault(reason, []).extend(numbers)


def read_chats(source: str, base_dir: Path | None, on_status: Callable[[str], None]) -> list[Chat]:
    """The chats of another source, such as questions to keep out. Raises DataError."""
    return list(_read(SourceSpec(source=source), 1, base_dir, on_status)[2].chats.values())


def _read(
    spec: SourceSpec, start: int, base_dir: Path | None, on_status: Callable[[str], None]
) -> tuple[list[Row], Form, Converted]:
    if is_stdlib(spec):
        return _read_stdlib(spec, start)
    raw = sources.read(spec, base_dir, on_status)
    if not raw:
        raise DataError("The data is empty", f"{spec.source} has no rows.", "Give at least one row.")
    form = form_of(spec, list(dict.fromkeys(column for row in raw for column in row)))
    return raw, form, formats.convert(dict(enumerate(raw, start)), form)


def form_of(spec: SourceSpec, columns: Sequence[str]) -> Form:
    """The form of rows with these columns: what the settings say, or what is found. Raises DataError for none."""
    if not spec.columns:
        return formats.detect(columns) if spec.format == "auto" else formats.check_columns(spec.format, columns)
    mapping.check(spec.columns, columns)
    form = formats.detect(spec.columns) if spec.format == "auto" else formats.check_columns(spec.format, spec.columns)
    return Form(form.name, f"data.columns: {_said(spec.columns)}", spec.columns)


def _said(columns: Mapping[str, str]) -> str:
    return ", ".join(f"{part} from {made_from}" for part, made_from in columns.items())


def is_stdlib(spec: SourceSpec) -> bool:
    """Whether the rows are those that are made here."""
    return spec.source == "stdlib-docs" and spec.rows is None


def _read_stdlib(spec: SourceSpec, start: int) -> tuple[list[Row], Form, Converted]:
    if spec.format not in ("auto", "messages"):
        raise DataError(
            f"stdlib-docs is not in the form {spec.format}", "Its rows are messages.", "Set data.format to auto."
        )
    rows = stdlib_docs.rows()
    chats = {number: _question_chat(row) for number, row in enumerate(rows, start)}
    return [row._asdict() for row in rows], _STDLIB, Converted(chats, {}, {})


def _question_chat(row: stdlib_docs.Row) -> Chat:
    return Chat([{"role": "user", "content": row.question}, {"role": "assistant", "content": row.answer}])
