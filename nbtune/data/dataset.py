"""From a DataSpec to training and held-out examples.

`read_rows` reads, recognises the form, converts every row to a chat, follows the recipe and splits; `load_examples`
renders and tokenises what is used. Everything that is wrong with the data is said before the first token of training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nbtune.data import formats, recipe, render, stdlib_docs
from nbtune.data.formats import Chat, Form
from nbtune.data.gather import Gathered, gather, is_stdlib, read_chats
from nbtune.data.recipe import StepReport
from nbtune.data.render import Example
from nbtune.data.values import Row
from nbtune.errors import DataError
from nbtune.recipe import Decontaminate
from nbtune.spec import DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnStatus = Callable[[str], None]

CUT_AWAY = "the answer begins after max_length"


@dataclasses.dataclass(frozen=True)
class Rows:
    """All usable rows as chats, split. A row's number is its place in the source, from 1."""

    form: Form  # of the first source
    raw: list[Row]  # every row as it was read
    starts: dict[int, str]  # number of a source's first row -> the source; its rows are counted on
    train: list[Chat]
    eval: list[Chat]
    train_numbers: list[int]
    eval_numbers: list[int]
    left_out: dict[str, list[int]]  # reason -> numbers of the rows that were dropped
    unusable: dict[str, list[int]]  # reason -> numbers of the rows that `read_rows` refuses
    steps: list[StepReport]  # what each step of the recipe did
    notes: list[str]  # what a person should know

    @property
    def format(self) -> str:
        return self.form.name

    @property
    def dropped(self) -> dict[str, int]:
        """Reason -> how many rows were left out."""
        return {reason: len(numbers) for reason, numbers in self.left_out.items()}

    def place(self, number: int) -> str:
        """Where a row stands: `row 17`, and of which source if there are several."""
        start = max(first for first in self.starts if first <= number)
        return f"row {number - start + 1:,}" + (f" of {self.starts[start]}" if len(self.starts) > 1 else "")


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


def read_rows(
    spec: DataSpec,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_dir: Path | None = None,
    on_status: OnStatus = ignore_status,
) -> Rows:
    """Read, convert and split the rows of `spec`; a relative file is looked up in `base_dir`, else where Python runs.

    Rows with an empty answer are dropped and counted, and so are those that the recipe drops. `tokenizer` is needed
    where a step counts tokens. Raises DataError where the source is missing, empty or damaged, its form unknown, or
    where rows cannot be used (no assistant turn, null fields, unknown roles): all of them are counted in one message,
    because training on what is left would hide that the file is not what it seems.
    """
    rows = sort_rows(spec, tokenizer=tokenizer, base_dir=base_dir, on_status=on_status)
    if rows.unusable:
        raise formats.unusable_error(rows.unusable, len(rows.raw), spec.source, rows.place)
    if not rows.train and not rows.eval:
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in rows.dropped.items())
        raise DataError(
            "There is nothing to train on",
            f"All {len(rows.raw):,} rows of {spec.source} were left out: {reasons}.",
            "Give rows with answers, or take a step out of data.recipe.",
        )
    return rows


def sort_rows(
    spec: DataSpec,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_dir: Path | None = None,
    on_status: OnStatus = ignore_status,
) -> Rows:
    """As `read_rows`, but rows that cannot be used are only listed."""
    found = gather(spec, base_dir, on_status)
    steps = recipe.follow(spec.recipe, found.table, tokenizer)
    held_out = _held_out(spec, found)
    train = {number: chat for number, chat in found.table.chats.items() if number not in held_out}
    evaluation = {number: chat for number, chat in found.table.chats.items() if number in held_out}
    for step in spec.recipe:
        if isinstance(step, Decontaminate):
            outside = read_chats(step.source, base_dir, on_status) if step.source else []
            steps.append(recipe.decontaminate(step, train, [*evaluation.values(), *outside]))
            gone = set(steps[-1].dropped)
            train = {number: chat for number, chat in train.items() if number not in gone}
    left_out = dict(found.left_out)
    for done in steps:
        if done.dropped:
            left_out[done.label] = sorted([*left_out.get(done.label, ()), *done.dropped])
    return Rows(
        form=found.form,
        raw=found.raw,
        starts=found.starts,
        train=list(train.values()),
        eval=list(evaluation.values()),
        train_numbers=list(train),
        eval_numbers=list(evaluation),
        left_out=left_out,
        unusable=found.table.unusable,
        steps=steps,
        notes=found.notes,
    )


def load_examples(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    base_dir: Path | None = None,
    on_status: OnStatus = ignore_status,
) -> Dataset:
    """Tokenise the rows of `spec` with the tokenizer's chat template.

    Examples longer than `max_length` tokens are cut at the end, and dropped and counted where nothing to learn remains;
    plain texts are split instead.
    `max_rows` and `max_eval_rows` choose rows spread evenly over the source. Raises DataError as `read_rows` does, and
    where the template cannot show a row or no example is left.
    """
    on_status(f"Reading {spec.source}")
    rows = read_rows(spec, tokenizer=tokenizer, base_dir=base_dir, on_status=on_status)
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


def _held_out(spec: DataSpec, found: Gathered) -> set[int]:
    """The rows that are held out."""
    chats = found.table.chats
    if is_stdlib(spec) and not spec.mix:  # whole modules of Python's library
        numbers = {stdlib_docs.Row(**found.raw[number - 1]): number for number in chats}
        return {numbers[row] for row in stdlib_docs.split(numbers, spec.eval_fraction, spec.seed)[1]}
    out = _drawn(list(chats.values()), spec.eval_fraction, spec.seed)
    return {number for number, chosen in zip(chats, out, strict=True) if chosen}


def _drawn(chats: Sequence[Chat], fraction: float, seed: int) -> list[bool]:
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
    kept_chats, kept_numbers = [chats[i] for i in chosen], [numbers[i] for i in chosen]
    for chat, found in zip(kept_chats, render.encode_many(kept_chats, tokenizer, kept_numbers), strict=True):
        shorter = [part for example in found for part in example.fitting(max_length, split=chat.raw)]
        kept = [part for part in shorter if part.supervised]
        examples += kept
        missed += not kept
        cut += not chat.raw and any(len(example) > max_length for example in found)
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
