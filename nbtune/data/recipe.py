"""Follows the steps of a recipe: which rows stay, which go, and why."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nbtune._expression import Condition, ConditionError
from nbtune.data import near, render
from nbtune.data.formats import Chat
from nbtune.data.messages import call_text
from nbtune.data.values import named
from nbtune.errors import DataError
from nbtune.recipe import Decontaminate, Deduplicate, Filter, Length, Part, Sample, Step, Usable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXAMPLES = 5  # dropped rows that a step shows


@dataclasses.dataclass
class Table:
    """The rows that are left, by number: as they are in the source, and as chats where they can be used."""

    rows: dict[int, Mapping[str, Any]]
    chats: dict[int, Chat]
    unusable: dict[str, list[int]]  # reason -> numbers

    @property
    def numbers(self) -> list[int]:
        """The rows that are left and have not been found empty, in order."""
        refused = {number for numbers in self.unusable.values() for number in numbers}
        return [number for number in self.rows if number in self.chats or number in refused]

    def drop(self, numbers: Iterable[int]) -> None:
        gone = set(numbers)
        self.rows = {number: row for number, row in self.rows.items() if number not in gone}
        self.chats = {number: chat for number, chat in self.chats.items() if number not in gone}
        left = {reason: [n for n in found if n not in gone] for reason, found in self.unusable.items()}
        self.unusable = {reason: found for reason, found in left.items() if found}


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What one step did."""

    step: Step
    label: str  # "filter: len(output) > 20"
    before: int  # rows
    after: int
    dropped: list[int]  # numbers of rows
    examples: list[str]  # why some of them went: "row 17 is like row 3"


def follow(steps: Sequence[Step], table: Table, tokenizer: PreTrainedTokenizerBase | None) -> list[StepReport]:
    """Take the steps that come before the split, changing `table`.

    Raises DataError where a condition names no column or has no answer for a row, and where a length in tokens is
    asked for without a tokenizer.
    """
    reports = []
    for step in steps:
        if isinstance(step, Decontaminate):  # after the split
            continue
        before = table.numbers
        why = _followed(step, table, tokenizer)
        table.drop(why)
        reports.append(_report(step, len(before), why))
    return reports


def decontaminate(step: Decontaminate, training: Mapping[int, Chat], held_out: Iterable[Chat]) -> StepReport:
    """Which training rows share a question, or `words` words of it in a row, with a held-out one."""
    seen: set[str] = set()
    whole: set[str] = set()
    for chat in held_out:
        text = part_of(chat, "question")
        seen |= {run for run in near.runs(text, step.words) if run.count(" ") == step.words - 1}
        whole.add(" ".join(near.words(text)))
    why = {}
    for number, chat in training.items():
        text = part_of(chat, "question")
        if " ".join(near.words(text)) in whole:
            why[number] = f"row {number:,}: its question is held out"
        elif common := near.runs(text, step.words) & seen:
            why[number] = f"row {number:,} shares {min(common)!r}"
    return _report(step, len(training), why)


def part_of(chat: Chat, part: Part) -> str:
    """What is asked in a chat, what is answered, or both. Of plain text, the text is each of them."""
    if chat.raw:
        return chat.messages[0]["content"]
    roles = {
        "question": ("user",),
        "answer": ("assistant",),
        "row": ("system", "developer", "user", "assistant", "tool"),
    }
    return "\n".join(
        "\n".join([message.get("content", ""), *map(call_text, message.get("tool_calls", ()))]).strip()
        for message in chat.messages
        if message["role"] in roles[part]
    )


def label(step: Step) -> str:
    """A step in a few words."""
    match step:
        case Filter():
            return f"filter: not {step.where}"
        case Length():
            limits = [f"fewer than {step.at_least:,}"] if step.at_least is not None else []
            limits += [f"more than {step.at_most:,}"] if step.at_most is not None else []
            return f"{step.of} of {' or '.join(limits)} {step.unit}"
        case Deduplicate():
            return f"copy of another {step.of}" if step.similarity == 1 else f"nearly a copy of another {step.of}"
        case Sample():
            return "not drawn"
        case Usable():
            return "cannot be used"
        case Decontaminate():
            return "asks what is held out"


def _followed(step: Step, table: Table, tokenizer: PreTrainedTokenizerBase | None) -> dict[int, str]:
    """The rows that a step drops, and why each of them."""
    match step:
        case Filter():
            return _filtered(step, table)
        case Length():
            return _measured(step, table.chats, tokenizer)
        case Deduplicate():
            return _copies(step, table.chats)
        case Sample():
            return _not_drawn(step, table.numbers)
        case Usable():
            return {n: f"row {n:,}: {reason}" for reason, numbers in table.unusable.items() for n in numbers}
    raise AssertionError(step)


def _filtered(step: Filter, table: Table) -> dict[int, str]:
    condition = Condition(step.where)
    columns = {column for row in table.rows.values() for column in row}
    if unknown := sorted(condition.columns - columns):
        raise DataError(
            f"There is no column {unknown[0]!r}",
            f"The step filter asks for {step.where!r}; the rows have the columns {named(sorted(columns))}.",
            'Name a column, and put texts in quotes: label == "good".',
        )
    why = {}
    for number in table.numbers:
        try:
            if not condition(table.rows[number]):
                why[number] = f"row {number:,}"
        except ConditionError as error:
            raise DataError(
                "A filter has no answer for a row",
                f"Row {number:,}: {step.where!r}: {error}.",
                "Say first what the column must be: answer is not None and answer > 3.",
            ) from error
    return why


def _measured(step: Length, chats: Mapping[int, Chat], tokenizer: PreTrainedTokenizerBase | None) -> dict[int, str]:
    if step.unit == "tokens" and tokenizer is None:
        raise DataError(
            "Lengths in tokens need the model's tokenizer", "", "Give the tokenizer, or count characters or words."
        )
    least, most = step.at_least or 0, float("inf") if step.at_most is None else step.at_most
    lengths = zip(chats, _lengths(step, chats, tokenizer), strict=True)
    return {
        number: f"row {number:,}: {length:,} {step.unit}" for number, length in lengths if not least <= length <= most
    }


def _lengths(step: Length, chats: Mapping[int, Chat], tokenizer: PreTrainedTokenizerBase | None) -> Iterable[int]:
    if tokenizer is None or step.unit != "tokens":
        texts = (part_of(chat, step.of) for chat in chats.values())
        return (len(text) if step.unit == "characters" else len(text.split()) for text in texts)
    if step.of == "row":
        examples = render.encode_many(list(chats.values()), tokenizer, list(chats))
        return (max(len(example) for example in found) for found in examples)
    texts = [part_of(chat, step.of) for chat in chats.values()]
    return map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]) if texts else ()


def _copies(step: Deduplicate, chats: Mapping[int, Chat]) -> dict[int, str]:
    numbers = list(chats)
    texts = (part_of(chat, step.of) for chat in chats.values())
    found = near.near_copies(texts, step.similarity) if step.similarity < 1 else _exact_copies(texts)
    word = "is the same as" if step.similarity == 1 else "is like"
    return {
        number: f"row {number:,} {word} row {numbers[earlier]:,}"
        for number, earlier in zip(numbers, found, strict=True)
        if earlier is not None
    }


def _exact_copies(texts: Iterable[str]) -> Iterable[int | None]:
    first: dict[str, int] = {}
    for place, text in enumerate(texts):
        earlier = first.setdefault(" ".join(text.casefold().split()), place)
        yield earlier if earlier != place else None


def _not_drawn(step: Sample, numbers: Sequence[int]) -> dict[int, str]:
    drawn = set(draw(numbers, step.rows, f"nbtune:sample:{step.seed}"))
    return {number: f"row {number:,}" for number in numbers if number not in drawn}


def draw(numbers: Sequence[int], count: int, seed: str) -> list[int]:
    """`count` of the numbers, or all where there are fewer; the same ones for the same seed."""
    return random.Random(seed).sample(numbers, min(count, len(numbers)))  # noqa: S311 - a draw, not a secret


def _report(step: Step, before: int, why: Mapping[int, str]) -> StepReport:
    examples = list(why.values())[:_EXAMPLES]
    return StepReport(step, label(step), before, before - len(why), list(why), examples)
