"""The prompts of a data set: what is asked, what the reference answers, and the tokens of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nbtune.data import Chat, encode_many, read_rows
from nbtune.data.formats import detect
from nbtune.data.messages import Message, call_text, message_list
from nbtune.data.packing import IGNORED
from nbtune.data.sources import read
from nbtune.data.values import Row, Unusable
from nbtune.errors import DataError, NbtuneError
from nbtune.infer.text import prompt_tokens
from nbtune.spec import DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Data = DataSpec | str | Path | Sequence[Any]

ASKING = ("prompt", "question", "query", "instruction", "problem", "input")  # columns of rows without answers


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One row of a prompt set."""

    place: str  # "row 17"
    text: str  # what is asked, for people; empty where the row is plain text
    reference: str | None
    chat: Chat  # up to the reference, which is its last message where there is one


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """What is asked, and what a person should know of it."""

    prompts: tuple[Prompt, ...]
    notes: tuple[str, ...] = ()


class PromptTokens(NamedTuple):
    """Token ids of a row; the reference's are those that training puts loss on, its end of turn included."""

    prompt: list[int]
    reference: list[int]  # empty where there is none


def read_prompts(
    data: Data,
    *,
    limit: int | None = None,
    all_rows: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PromptSet:
    """The prompts of what trains a run (a DataSpec, a source, rows), of rows without answers, or a list of texts.

    Of a DataSpec the held-out rows, or `all_rows`; of anything else all; of these the first `limit`. `tokenizer` is
    needed where a step of its recipe counts tokens. Raises DataError as `nbtune.data.read_rows` does, and where there
    are no prompts.
    """
    if limit is not None and limit < 1:
        raise DataError("There are no prompts", f"limit is {limit}.", "Ask for one row or more.")
    held_out = isinstance(data, DataSpec) and not all_rows
    found = _texts(data) if _is_texts(data) else _of_spec(_spec(data), held_out, tokenizer)
    if not found.prompts:
        raise DataError("There are no prompts", "The data is empty.", "Give at least one row.")
    return dataclasses.replace(found, prompts=found.prompts[:limit])


def tokens_of(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> PromptTokens:
    """Its tokens, by the chat template. Raises NbtuneError where the template refuses it, or nothing is asked."""
    if prompt.reference is None:
        if tokenizer.chat_template is None:
            ids = tokenizer("\n".join(message["content"] for message in prompt.chat.messages))["input_ids"]
        else:
            ids = prompt_tokens(prompt.chat.messages, tokenizer)
        found = PromptTokens(list(ids), [])  # pyright: ignore[reportArgumentType]
    else:
        ((example,),) = encode_many([prompt.chat], tokenizer)
        scored = np.flatnonzero(example.labels != IGNORED)
        start, end = max(1, int(scored[0])) if prompt.chat.raw else int(scored[0]), int(scored[-1]) + 1
        found = PromptTokens(example.input_ids[:start].tolist(), example.input_ids[start:end].tolist())
    if not found.prompt:
        raise NbtuneError("The row asks nothing", "Its prompt has no tokens.")
    return found


def _is_texts(data: Data) -> bool:
    return isinstance(data, list | tuple) and all(isinstance(item, str) for item in data)


def _texts(data: Any) -> PromptSet:
    return PromptSet(tuple(_asked(f"prompt {number:,}", [_user(text)]) for number, text in enumerate(data, 1)))


def _spec(data: Data) -> DataSpec:
    if isinstance(data, DataSpec):
        return data
    if isinstance(data, str | Path):
        return DataSpec(source=str(data))
    try:
        return DataSpec.from_rows(data)
    except ValueError as error:
        raise DataError("These are no rows", str(error), "Give dicts, a DataFrame, a file or texts to ask.") from error


def _of_spec(spec: DataSpec, held_out: bool, tokenizer: PreTrainedTokenizerBase | None) -> PromptSet:
    try:
        rows = read_rows(spec, tokenizer=tokenizer)
    except DataError:
        if unanswered := _unanswered(spec):
            return PromptSet(tuple(unanswered))
        raise
    notes = [f"{count:,} rows are left out: {reason}." for reason, count in rows.dropped.items()]
    chats = dict(zip(rows.eval_numbers, rows.eval, strict=True))
    if not held_out or not chats:
        if held_out:
            notes.append("No rows are held out: these are rows that the data trains on.")
        chats |= dict(zip(rows.train_numbers, rows.train, strict=True))
    return PromptSet(tuple(_answered(rows.place(number), chats[number]) for number in sorted(chats)), tuple(notes))


def _answered(place: str, chat: Chat) -> Prompt:
    """A row whose last answer is the reference."""
    if chat.raw:
        return Prompt(place, "", chat.messages[0]["content"], chat)
    last = max(index for index, message in enumerate(chat.messages) if message["role"] == "assistant")
    messages = chat.messages[: last + 1]
    chat = dataclasses.replace(chat, messages=messages, trained_from=last)
    return Prompt(place, _shown(messages[:-1]), _said(messages[-1]), chat)


def _asked(place: str, messages: list[Message]) -> Prompt:
    return Prompt(place, _shown(messages), None, Chat(messages))


def _unanswered(spec: DataSpec) -> list[Prompt]:
    """The prompts of rows that have no answer; none where the source is of another form."""
    if spec.columns or spec.mix or spec.recipe or spec.source == "stdlib-docs":
        return []
    rows = read(spec, None, lambda _: None)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    try:
        form = detect(columns).name
    except DataError:
        column = next((name for name in ASKING if name in columns), None)
        return [] if column is None else _prompts(rows, lambda row: [_user(row[column])])
    return _prompts(rows, lambda row: message_list(row["messages"], "messages")) if form == "messages" else []


def _prompts(rows: Sequence[Row], messages: Any) -> list[Prompt]:
    """A prompt of each row; none at all where one of them cannot be used, or says an answer."""
    found = []
    for number, row in enumerate(rows, 1):
        try:
            asked = messages(row)
        except (Unusable, KeyError):
            return []
        if any(not isinstance(part.get("content"), str) or part["role"] == "assistant" for part in asked):
            return []
        found.append(_asked(f"row {number:,}", asked))
    return found


def _user(text: Any) -> Message:
    return {"role": "user", "content": text}


def _shown(messages: Sequence[Message]) -> str:
    """One question as it is; a conversation with who says what."""
    if len(messages) == 1:
        return _said(messages[0])
    return "\n".join(f"{message['role']}: {_said(message)}" for message in messages)


def _said(message: Message) -> str:
    return message.get("content") or "\n".join(call_text(call) for call in message.get("tool_calls", ()))
