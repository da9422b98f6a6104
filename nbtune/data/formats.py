"""Rows of a known form to chats: alpaca, prompt/completion, messages, ShareGPT, preference pairs and plain text.

The form is read from the columns, or given. Every row is converted before anything is trained, so that what cannot be
used is reported at once, with how many rows it concerns and which is the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from nbtune.data.mapping import made_of
from nbtune.data.messages import Message, is_message, message_list, tool_list
from nbtune.data.values import Unusable, is_list, is_null, named, optional_text, parsed, required_text
from nbtune.errors import DataError

Row = Mapping[str, Any]

EMPTY = "empty answer"

# The columns that each form must have. The first form that fits is taken.
_REQUIRED = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "preference": ("chosen", "rejected"),
    "sharegpt": ("conversations",),
    "text": ("text",),
}
_OPTIONAL = {
    "messages": ("tools",),
    "prompt_completion": ("system", "tools"),
    "alpaca": ("input", "system"),
    "preference": ("prompt", "conversations", "messages", "question", "instruction", "system", "tools"),
    "sharegpt": ("system", "tools"),
    "text": (),
}
_SAID = {
    "messages": "messages (a list of role and content)",
    "prompt_completion": "prompt_completion (prompt, completion)",
    "alpaca": "alpaca (instruction, input, output)",
    "preference": "preference (prompt, chosen, rejected)",
    "sharegpt": "sharegpt (conversations: a list of from and value)",
    "text": "text (text)",
}
# Names that tables give to a question and its answer.
_PAIRS = (
    ("question", "answer"), ("query", "response"), ("query", "answer"), ("question", "response"),
    ("instruction", "response"), ("prompt", "response"), ("problem", "solution"), ("input", "output"),
)  # fmt: skip
_KNOWN = f"Known forms: {', '.join(_SAID.values())}."
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")  # columns beside the text


@dataclasses.dataclass(frozen=True)
class Chat:
    """One conversation. Assistant turns from `trained_from` on carry loss; those before are context."""

    messages: list[Message]
    trained_from: int = 0
    plain: bool = False  # a bare prompt and completion, which a model without chat template reads as one text
    raw: bool = False  # one message that is text to go on with: read without a template, every token trained
    tools: list[dict[str, Any]] | None = None  # the functions that the assistant may call


@dataclasses.dataclass(frozen=True)
class Form:
    """What rows are, why that is thought, and the columns that stand for others."""

    name: str
    reason: str
    mapping: dict[str, str]  # part of the form -> column, where their names differ


@dataclasses.dataclass(frozen=True)
class Converted:
    """Chats, with the number of the row each came from, and the rows that gave none, by reason."""

    chats: dict[int, Chat]
    left_out: dict[str, list[int]]  # nothing to learn from: dropped
    unusable: dict[str, list[int]]  # not what the form says: an error


def detect(columns: Iterable[str]) -> Form:
    """The form of rows with these columns. Raises DataError naming the columns and the known forms."""
    columns = list(columns)
    for name, required in _REQUIRED.items():
        if all(column in columns for column in required):
            return Form(name, _reason(name, columns), {})
    for question, answer in _PAIRS:
        if question in columns and answer in columns:
            reason = f"columns {question} and {answer}, read as prompt and completion"
            return Form("prompt_completion", reason, {"prompt": question, "completion": answer})
    raise DataError(
        "The form of the data is not known",
        f"The rows have the columns {named(columns)}. {_KNOWN}",
        "Rename the columns to those of one form, or say in data.columns what its parts are made of.",
    )


def check_columns(form: str, columns: Iterable[str]) -> Form:
    """The given form. Raises DataError where rows with these columns cannot be of it."""
    columns = list(columns)
    missing = [column for column in _REQUIRED[form] if column not in columns]
    if missing:
        raise DataError(
            f"The data is not in the form {form}",
            f"{named(missing)} is missing; the rows have the columns {named(columns)}.",
            f"{_KNOWN} Set data.format to the right one, or to auto.",
        )
    return Form(form, f"data.format is {form}", {})


def parts(form: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The parts that a row of a form must have, and those that it may have."""
    return _REQUIRED[form], _OPTIONAL[form]


def convert(rows: Mapping[int, Row], form: Form) -> Converted:
    """Convert all rows, given by number; those with an empty answer are left out."""
    convert_one = _CONVERTERS[form.name]
    converted = Converted({}, {}, {})
    for number, row in rows.items():
        try:
            row = made_of(form.mapping, row) if form.mapping else row
            _check_text_only(row)
            chat = convert_one(row)
        except Unusable as reason:
            converted.unusable.setdefault(str(reason), []).append(number)
            continue
        if _is_empty(chat):
            converted.left_out.setdefault(EMPTY, []).append(number)
        else:
            converted.chats[number] = chat
    return converted


def unusable_error(
    unusable: Mapping[str, Sequence[int]], total: int, where: str, place: Callable[[int], str] = "row {:,}".format
) -> DataError:
    """What to say of rows that cannot be used: every reason, its count and the place of its first row."""
    count = sum(len(numbers) for numbers in unusable.values())
    lines = [
        f"{len(numbers):,} {'row' if len(numbers) == 1 else 'rows'}: {reason} (first: {place(numbers[0])})"
        for reason, numbers in sorted(unusable.items(), key=lambda item: -len(item[1]))
    ]
    if len(lines) > 5:
        lines[5:] = [f"and {len(lines) - 5} more reasons"]
    return DataError(
        f"{count:,} of {total:,} rows cannot be used",
        f"{where}: " + "; ".join(lines) + ".",
        "Mend or remove them, or add the step `usable` to data.recipe, which drops them.",
    )


def _reason(form: str, columns: Sequence[str]) -> str:
    shown = [column for column in columns if column in (*_REQUIRED[form], *_OPTIONAL[form])]
    text = f"column{'s' if len(shown) > 1 else ''} {', '.join(shown)}"
    if form == "preference":
        text += "; trained on the chosen answers: there is no training by preference yet"
    if form == "text":
        text += ": every token is trained"
    return text


def _check_text_only(row: Row) -> None:
    for column in _MEDIA:
        value = parsed(row.get(column))
        if not is_null(value) and not (isinstance(value, str | list | tuple) and not value):
            raise Unusable(f"it has {column} beside its text, which cannot be trained on yet")


def _alpaca(row: Row) -> Chat:
    instruction = required_text(row, "instruction")
    extra = optional_text(row, "input")
    question = f"{instruction}\n\n{extra}" if instruction and extra else instruction or extra
    if not question.strip():
        raise Unusable("`instruction` and `input` are empty")
    return Chat([*_system(row), *_asked(question), _answer(required_text(row, "output"))])


def _prompt_completion(row: Row) -> Chat:
    prompt, completion = parsed(row.get("prompt")), parsed(row.get("completion"))
    if is_list(prompt) != is_list(completion):
        raise Unusable("one of `prompt` and `completion` is text and the other a list of messages")
    tools = tool_list(row.get("tools"))
    if is_list(prompt):
        context = message_list(prompt, "prompt")
        answer = message_list(completion, "completion")
        if not any(message["role"] == "assistant" for message in answer):
            raise Unusable("`completion` has no assistant turn")
        return Chat(context + answer, trained_from=len(context), tools=tools)
    messages = [*_asked(required_text(row, "prompt")), _answer(required_text(row, "completion"))]
    return Chat([*_system(row), *messages], plain=not row.get("system"))


def _messages(row: Row, column: str = "messages") -> Chat:
    messages = message_list(row.get(column), column)
    if not any(message["role"] == "assistant" for message in messages):
        raise Unusable("no assistant turn, so nothing to learn")
    _check_begin(messages)
    return Chat(messages, tools=tool_list(row.get("tools")))


def _sharegpt(row: Row) -> Chat:
    chat = _messages(row, "conversations")
    if chat.messages[0]["role"] == "system":
        return chat
    return dataclasses.replace(chat, messages=[*_system(row), *chat.messages])


def _preference(row: Row) -> Chat:
    """The chat that ends with the chosen answer, which alone is trained."""
    chosen, rejected = (_chosen(row, column) for column in ("chosen", "rejected"))
    if chosen[0]["role"] in ("assistant", "tool"):
        context = [*_system(row), *_context(row)]
    else:  # whole chats, the same up to the answers
        context, chosen = _split_common(chosen, rejected)
    if not any(message["role"] == "assistant" for message in chosen):
        raise Unusable("`chosen` has no assistant turn")
    _check_begin([*context, *chosen])
    return Chat([*context, *chosen], trained_from=len(context), tools=tool_list(row.get("tools")))


def _chosen(row: Row, column: str) -> list[Message]:
    value = parsed(row.get(column))
    if is_list(value):
        return message_list(value, column)
    return message_list([value], column) if is_message(value) else [_answer(required_text(row, column))]


def _context(row: Row) -> list[Message]:
    for column in _OPTIONAL["preference"][:-2]:
        value = parsed(row.get(column))
        if is_list(value):
            return message_list(value, column)
        if not is_null(value):
            return _asked(required_text(row, column))
    raise Unusable("there is no prompt beside `chosen`")


def _split_common(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message]]:
    same = 0
    while same < min(len(chosen) - 1, len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    return chosen[:same], chosen[same:]


def _text(row: Row) -> Chat:
    return Chat([_answer(required_text(row, "text"))], raw=True)


_CONVERTERS: dict[str, Callable[[Row], Chat]] = {
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "preference": _preference,
    "sharegpt": _sharegpt,
    "text": _text,
}


def _check_begin(messages: Sequence[Message]) -> None:
    first = next(message["role"] for message in messages if message["role"] not in ("system", "developer"))
    if first == "assistant":
        raise Unusable("the chat begins with an assistant turn; nothing was asked")


def _system(row: Row) -> list[Message]:
    text = optional_text(row, "system")
    return [{"role": "system", "content": text}] if text else []


def _asked(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _is_empty(chat: Chat) -> bool:
    """Whether no trained assistant turn says or calls anything."""
    return not any(
        message.get("content", "").strip() or message.get("tool_calls")
        for message in chat.messages[chat.trained_from :]
        if message["role"] == "assistant"
    )
