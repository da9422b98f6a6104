"""Rows of a known form to chats: alpaca, prompt/completion, messages.

The form is read from the columns, or given. Every row is converted before anything is trained, so that what cannot be
used is reported at once, with how many rows it concerns and which is the first.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from nbtune.errors import DataError

Message = dict[str, Any]

EMPTY = "empty answer"
ROLES = ("system", "developer", "user", "assistant", "tool")

_REQUIRED = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
_KNOWN = (
    "Known forms: alpaca (instruction, input, output), prompt_completion (prompt, completion)"
    " and messages (a list of role and content)."
)
_KINDS = {
    "bool": "true or false",
    "dict": "an object",
    "float": "a number",
    "int": "a number",
    "list": "a list",
    "str": "text",
}
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")  # columns beside the text
_HINTS = {
    "conversations": "Chats in a `conversations` column (ShareGPT) must be rewritten to `messages` first.",
    "chosen": "Preference pairs (`chosen`, `rejected`) are not examples to imitate.",
    "text": "Plain text has no question and answer.",
}


@dataclasses.dataclass(frozen=True)
class Chat:
    """One conversation. Assistant turns from `trained_from` on carry loss; those before are context."""

    messages: list[Message]
    trained_from: int = 0
    plain: bool = False  # a bare prompt and completion, which a model without chat template reads as one text


@dataclasses.dataclass(frozen=True)
class Converted:
    """Chats, with the number of the row each came from (counted from 1), and the rows that gave none, by reason."""

    chats: list[Chat]
    numbers: list[int]
    left_out: dict[str, list[int]]  # nothing to learn from: dropped
    unusable: dict[str, list[int]]  # not what the form says: an error


class _Unusable(Exception):  # noqa: N818 - not an error of the program: the row is counted
    """Why a row cannot be used."""


def detect(columns: Iterable[str]) -> str:
    """The form of rows with these columns. Raises DataError naming the columns and the known forms."""
    columns = list(columns)
    for form, required in _REQUIRED.items():
        if all(name in columns for name in required):
            return form
    hints = [hint for name, hint in _HINTS.items() if name in columns]
    raise DataError(
        "The form of the data is not known",
        f"The rows have the columns {_list(columns)}. {_KNOWN}",
        " ".join([*hints, "Rename the columns to those of one form."]),
    )


def check_columns(form: str, columns: Iterable[str]) -> None:
    """Raise DataError where rows with these columns cannot be of the given form."""
    columns = list(columns)
    if missing := [name for name in _REQUIRED[form] if name not in columns]:
        raise DataError(
            f"The data is not in the form {form}",
            f"{_list(missing)} is missing; the rows have the columns {_list(columns)}.",
            f"{_KNOWN} Set data.format to the right one, or to auto.",
        )


def convert(rows: Sequence[Mapping[str, Any]], form: str) -> Converted:
    """Convert all rows; those with an empty answer are left out."""
    convert_one = {"messages": _messages, "prompt_completion": _prompt_completion, "alpaca": _alpaca}[form]
    converted = Converted([], [], {}, {})
    for number, row in enumerate(rows, start=1):
        try:
            _check_text_only(row)
            chat = convert_one(row)
        except _Unusable as reason:
            converted.unusable.setdefault(str(reason), []).append(number)
            continue
        if _is_empty(chat):
            converted.left_out.setdefault(EMPTY, []).append(number)
            continue
        converted.chats.append(chat)
        converted.numbers.append(number)
    return converted


def unusable_error(unusable: Mapping[str, Sequence[int]], total: int, where: str) -> DataError:
    """What to say of rows that cannot be used: every reason, its count and its first row."""
    count = sum(len(numbers) for numbers in unusable.values())
    lines = [
        f"{len(numbers):,} {'row' if len(numbers) == 1 else 'rows'}: {reason} (first: row {numbers[0]:,})"
        for reason, numbers in sorted(unusable.items(), key=lambda item: -len(item[1]))
    ]
    if len(lines) > 5:
        lines[5:] = [f"and {len(lines) - 5} more reasons"]
    return DataError(
        f"{count:,} of {total:,} rows cannot be used", f"{where}: " + "; ".join(lines) + ".", "Mend or remove them."
    )


def _check_text_only(row: Mapping[str, Any]) -> None:
    for column in _MEDIA:
        if row.get(column) is not None and not _is_null(row[column]) and row[column] not in ("", []):
            raise _Unusable(f"it has {column} beside its text")


def _alpaca(row: Mapping[str, Any]) -> Chat:
    instruction = _text(row, "instruction")
    extra = _optional_text(row, "input")
    question = f"{instruction}\n\n{extra}" if instruction and extra else instruction or extra
    if not question.strip():
        raise _Unusable("`instruction` and `input` are empty")
    return Chat(
        [*_system(row), {"role": "user", "content": question}, {"role": "assistant", "content": _text(row, "output")}]
    )


def _prompt_completion(row: Mapping[str, Any]) -> Chat:
    prompt, completion = _parsed(row.get("prompt")), _parsed(row.get("completion"))
    if _is_list(prompt) != _is_list(completion):
        raise _Unusable("one of `prompt` and `completion` is text and the other a list of messages")
    if _is_list(prompt):
        context = _message_list(prompt, "prompt")
        answer = _message_list(completion, "completion")
        if not any(message["role"] == "assistant" for message in answer):
            raise _Unusable("`completion` has no assistant turn")
        return Chat(context + answer, trained_from=len(context))
    messages = [
        {"role": "user", "content": _text(row, "prompt")},
        {"role": "assistant", "content": _text(row, "completion")},
    ]
    return Chat([*_system(row), *messages], plain=not row.get("system"))


def _messages(row: Mapping[str, Any]) -> Chat:
    value = _parsed(row.get("messages"))
    if not _is_list(value):
        raise _Unusable("`messages` is null" if _is_null(value) else "`messages` is no list")
    messages = _message_list(value, "messages")
    if not any(message["role"] == "assistant" for message in messages):
        raise _Unusable("no assistant turn, so nothing to learn")
    return Chat(messages)


def _message_list(value: Any, column: str) -> list[Message]:
    messages = []
    for entry in value:
        if not isinstance(entry, Mapping):
            raise _Unusable(f"`{column}` holds something that is no message")
        # Parquet gives every message every field; those that are null were not there.
        message = {key: item for key, item in entry.items() if not _is_null(item)}
        role = message.get("role")
        if role is None:
            raise _Unusable("a message without a role")
        if role not in ROLES:
            raise _Unusable(f"the role {role!r}; known are {', '.join(ROLES)}")
        if "content" in message:
            message["content"] = _content(message["content"])
        elif not (role == "assistant" and message.get("tool_calls")):
            raise _Unusable(f"the content of a message of the {role} is null")
        messages.append(message)
    if not messages:
        raise _Unusable(f"`{column}` is empty")
    return messages


def _content(value: Any) -> str:
    if isinstance(value, str):
        return value
    if _is_list(value):
        if all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value):
            return "".join(part["text"] for part in value)
        raise _Unusable("a message with images, audio or other parts than text")
    raise _Unusable(f"the content of a message is {_kind(value)}, not text")


def _system(row: Mapping[str, Any]) -> list[Message]:
    text = _optional_text(row, "system")
    return [{"role": "system", "content": text}] if text else []


def _text(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise _Unusable(f"`{column}` is missing")
    if _is_null(row[column]):
        raise _Unusable(f"`{column}` is null")
    return _as_text(row[column], column)


def _optional_text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    return "" if _is_null(value) else _as_text(value, column)


def _as_text(value: Any, column: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):  # an answer such as 42
        return str(value)
    raise _Unusable(f"`{column}` is {_kind(value)}, not text")


def _parsed(value: Any) -> Any:
    """A list of messages that a CSV or Parquet file carries as JSON text, or pandas as an array."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value  # a text that happens to begin so
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # pandas writes null as NaN


def _is_empty(chat: Chat) -> bool:
    """Whether no trained assistant turn says or calls anything."""
    return not any(
        message.get("content", "").strip() or message.get("tool_calls")
        for message in chat.messages[chat.trained_from :]
        if message["role"] == "assistant"
    )


def _kind(value: Any) -> str:
    return _KINDS.get(type(value).__name__, f"a {type(value).__name__}")


def _list(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "(none)"
