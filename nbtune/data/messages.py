"""Lists of messages, as OpenAI (`role`, `content`) and ShareGPT (`from`, `value`) write them, and the tools they call.

What comes out is what chat templates read: roles system, user, assistant and tool; calls as
`{"type": "function", "function": {"name": ..., "arguments": {...}}}`; tools as JSON schemas of functions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nbtune.data.values import Unusable, is_list, is_null, kind, parsed, sound

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}


def message_list(value: Any, column: str) -> list[Message]:
    """The messages of a column. Raises Unusable where one of them is none."""
    value = parsed(value)
    if not is_list(value):
        raise Unusable(f"`{column}` is null" if is_null(value) else f"`{column}` is no list")
    messages = [_message(entry, column) for entry in value]
    if not messages:
        raise Unusable(f"`{column}` is empty")
    return messages


def is_message(value: Any) -> bool:
    """Whether it is one message by itself, as an answer to choose may be."""
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def tool_list(value: Any) -> list[dict[str, Any]] | None:
    """The functions that a row's assistant may call; None where there are none. Raises Unusable where it is no list."""
    if is_null(value) or value == "":
        return None
    value = parsed(value)
    if not is_list(value) or not all(isinstance(tool, Mapping) for tool in value):
        raise Unusable("`tools` is no list of functions")
    sound(json.dumps(value, ensure_ascii=False, default=str), "`tools`")
    tools = [_without_nulls(tool) for tool in value]
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools] or None


def _message(entry: Any, column: str) -> Message:
    if not isinstance(entry, Mapping):
        raise Unusable(f"`{column}` holds something that is no message")
    # Parquet gives every message every field; those that are null were not there.
    message = {key: item for key, item in entry.items() if not is_null(item)}
    if "from" in message and "role" not in message:
        return _from_sharegpt(message)
    role = message.get("role")
    if role is None:
        raise Unusable("a message without a role")
    if role not in ROLES:
        raise Unusable(f"the role {role!r}; known are {', '.join(ROLES)}")
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"])
    if "content" in message:
        message["content"] = _content(message["content"])
    elif not (role == "assistant" and message.get("tool_calls")):
        raise Unusable(f"the content of a message of the {role} is null")
    return message


def _from_sharegpt(message: Message) -> Message:
    name = message["from"]
    if not isinstance(name, str) or name not in _SHAREGPT_ROLES:
        raise Unusable(f"the role {name!r}; known are {', '.join(_SHAREGPT_ROLES)}")
    if "value" not in message:
        raise Unusable(f"the value of a message from {name} is null")
    if name == "function_call":
        return {"role": "assistant", "tool_calls": _calls(message["value"])}
    return {"role": _SHAREGPT_ROLES[name], "content": _content(message["value"])}


def _content(value: Any) -> str:
    if isinstance(value, str):
        return sound(value, "the content of a message")
    if is_list(value):
        if all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value):
            return sound("".join(part["text"] for part in value), "the content of a message")
        raise Unusable("a message with images, audio or other parts than text")
    raise Unusable(f"the content of a message is {kind(value)}, not text")


def _calls(value: Any) -> list[dict[str, Any]]:
    value = parsed(value)
    calls = [value] if isinstance(value, Mapping) else value
    if not is_list(calls):
        raise Unusable("a function call is no JSON object")
    return [_call(call) for call in calls]


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Unusable("a function call without a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # OpenAI writes them as JSON text; templates would put that in quotes
        arguments = parsed(arguments)
    made = {key: value for key, value in call.items() if value is not None} if "function" in call else {}
    made = {"type": "function", **made, "function": {**function, "arguments": {} if arguments is None else arguments}}
    sound(call_text(made), "a function call")
    return made


def _without_nulls(value: Any) -> Any:
    """Parquet gives every object the fields of all; those that are null were not there."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if is_list(value) else value


def call_text(call: Mapping[str, Any]) -> str:
    """A call as text, to measure and compare it."""
    return json.dumps(call.get("function", call), ensure_ascii=False, sort_keys=True, default=str)
