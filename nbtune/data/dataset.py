"""From a DataSpec to training and held-out examples.

`read_rows` reads, recognises the form, converts every row to a chat and splits; `load_examples` renders and tokenises
what is used. Everything that is wrong with the data is reported before the first token of training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nbtune.data import formats, render, sources, stdlib_docs
from nbtune.data.formats import Chat
from nbtune.data.render import Example
from nbtune.data.sources import Row
from nbtune.errors import DataError
from nbtune.spec import DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnStatus = Callable[[str], None]

CUT_AWAY = "the answer begins after max_length"


@dataclasses.dataclass(frozen=True)
class Rows:
    """All usable rows as chats, split. A row's number is its place in the source, from 1."""

    format: str
    reason: str  # why it is this form
    raw: list[Row]  # every row as it was read
    train: list[Chat]
    eval: list[Chat]
    train_numbers: list[int]
    eval_numbers: list[int]
    left_out: dict[str, list[int]]  # reason -> numbers of the rows that were dropped
    unusable: dict[str, list[int]]  # reason -> numbers of the rows that `read_rows` refuses

    @property
    def dropped(self) -> dict[str, int]:
        """Reason -> how many rows were left out."""
        return {reason: len(numbers) for reason, numbers in self.left_out.items()}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Tokenised examples, ready to be batched."""

    train: list[Example]
    eval: list[Example]
    dropped: dict[str, int]  # reason -> rows
    cut: int  # rows that were longer than max_length and lost their end
    format: str
    fingerprint: str  # SHA-256 of all tokens and labels, in hex

    @property
    def train_tokens(self) -> int:
        return sum(len(example) for example in self.train)


def ignore_status(message: str) -> None:
    """The `on_status` of a caller that does not listen."""


def read_rows(spec: DataSpec, *, base_dir: Path | None = None, on_status: OnStatus = ignore_status) -> Rows:
    """Read, convert and split the rows of `spec`; a relative file is looked up in `base_dir`, else where Python runs.

    Rows with an empty answer are dropped and counted. Raises DataError where the source is missing, empty or damaged,
    its form unknown, or where rows cannot be used (no assistant turn, null fields, unknown roles): all of them are
    counted in one message, because training on what is left would hide that the file is not what it seems.
    """
    rows = sort_rows(spec, base_dir=base_dir, on_status=on_status)
    if rows.unusable:
        raise formats.unusable_error(rows.unusable, len(rows.raw), spec.source)
    if not rows.train and not rows.eval:
        raise DataError(
            "There is nothing to train on", f"All {len(rows.raw):,} rows of {spec.source} have an empty answer."
        )
    return rows


def sort_rows(spec: DataSpec, *, base_dir: Path | None = None, on_status: OnStatus = ignore_status) -> Rows:
    """As `read_rows`, but rows that cannot be used are only listed."""
    if spec.source == "stdlib-docs" and spec.rows is None:
        return _read_stdlib(spec)
    raw = sources.read(spec, base_dir, on_status)
    if not raw:
        raise DataError("The data is empty", f"{spec.source} has no rows.", "Give at least one row.")
    columns = list(dict.fromkeys(column for row in raw for column in row))
    form = spec.format if spec.format != "auto" else formats.detect(columns)
    formats.check_columns(form, columns)
    converted = formats.convert(raw, form)
    held_out = _held_out(converted.chats, spec.eval_fraction, spec.seed)
    pairs = list(zip(converted.chats, converted.numbers, held_out, strict=True))
    return Rows(
        format=form,
        reason=f"columns {', '.join(columns)}",
        raw=raw,
        train=[chat for chat, _, out in pairs if not out],
        eval=[chat for chat, _, out in pairs if out],
        train_numbers=[number for _, number, out in pairs if not out],
        eval_numbers=[number for _, number, out in pairs if out],
        left_out=converted.left_out,
        unusable=converted.unusable,
    )


def load_examples(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    base_dir: Path | None = None,
    on_status: OnStatus = ignore_status,
) -> Dataset:
    """Tokenise the rows of `spec` with the model's own chat template.

    Examples longer than `max_length` tokens are cut at the end, and dropped and counted where nothing to learn remains.
    `max_rows` and `max_eval_rows` choose rows spread evenly over the source. Raises DataError as `read_rows` does, and
    where the template cannot show a row or no example is left.
    """
    on_status(f"Reading {spec.source}")
    rows = read_rows(spec, base_dir=base_dir, on_status=on_status)
    chosen = spread(len(rows.train), spec.max_rows)
    on_status(f"Tokenising {len(chosen):,} rows")
    train, missed, cut = _encode(rows.train, rows.train_numbers, chosen, tokenizer, max_length)
    chosen = spread(len(rows.eval), spec.max_eval_rows)
    evaluation, missed_eval, cut_eval = _encode(rows.eval, rows.eval_numbers, chosen, tokenizer, max_length)
    if not train:
        raise DataError(
            "There is nothing to train on",
            f"In all {missed:,} training rows the answer begins after max_length = {max_length} tokens.",
            "Raise training.max_length, or shorten the prompts.",
        )
    dropped = dict(rows.dropped)
    if missed + missed_eval:
        dropped[CUT_AWAY] = missed + missed_eval
    return Dataset(train, evaluation, dropped, cut + cut_eval, rows.format, _fingerprint(train, evaluation))


def _read_stdlib(spec: DataSpec) -> Rows:
    if spec.format not in ("auto", "messages"):
        raise DataError(
            f"stdlib-docs is not in the form {spec.format}", "Its rows are messages.", "Set data.format to auto."
        )
    train, held_out = stdlib_docs.split(stdlib_docs.rows(), spec.eval_fraction, spec.seed)
    numbers = {row: number for number, row in enumerate(stdlib_docs.rows(), start=1)}
    return Rows(
        format="messages",
        reason="made here from Python's own documentation",
        raw=[row._asdict() for row in stdlib_docs.rows()],
        train=[_question_chat(row) for row in train],
        eval=[_question_chat(row) for row in held_out],
        train_numbers=[numbers[row] for row in train],
        eval_numbers=[numbers[row] for row in held_out],
        left_out={},
        unusable={},
    )


def _question_chat(row: stdlib_docs.Row) -> Chat:
    return Chat([{"role": "user", "content": row.question}, {"role": "assistant", "content": row.answer}])


def _held_out(chats: Sequence[Chat], fraction: float, seed: int) -> list[bool]:
    """Which chats are held out: a share of the different ones, so that copies of one are all on the same side."""
    keys = [_key(chat, seed) for chat in chats]
    different = sorted(set(keys))
    count = round(fraction * len(different))
    if fraction > 0 and len(different) > 1:
        count = min(max(count, 1), len(different) - 1)
    chosen = set(different[:count])  # the keys are hashes: their order is a draw
    return [key in chosen for key in keys]


def _key(chat: Chat, seed: int) -> bytes:
    """The same for chats that differ in white space or case only."""
    messages = [m | {"content": " ".join(m.get("content", "").casefold().split())} for m in chat.messages]
    text = json.dumps(messages, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(f"{seed}:{text}".encode("utf-8", "surrogatepass")).digest()


def spread(count: int, at_most: int | None) -> list[int]:
    """At most `at_most` of `count` indices, evenly spaced."""
    if at_most is None or count <= at_most:
        return list(range(count))
    return [index * count // at_most for index in range(at_most)]


def _encode(
    chats: Sequence[Chat],
    numbers: Sequence[int],
    chosen: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> tuple[list[Example], int, int]:
    """The examples, how many rows gave none because they were cut, and how many were cut."""
    examples: list[Example] = []
    missed = cut = 0
    for found in render.encode_many([chats[i] for i in chosen], tokenizer, [numbers[i] for i in chosen]):
        kept = [short for example in found if (short := example.cut(max_length)).supervised]
        examples += kept
        missed += not kept
        cut += any(len(example) > max_length for example in found)
    return examples, missed, cut


def _fingerprint(train: Sequence[Example], evaluation: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for examples in (train, evaluation):
        digest.update(len(examples).to_bytes(8, "little"))
        for example in examples:
            digest.update(len(example).to_bytes(8, "little"))
            digest.update(example.input_ids.tobytes())
            digest.update(example.labels.tobytes())
    return digest.hexdigest()
