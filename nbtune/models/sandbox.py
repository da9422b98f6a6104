"""Chat templates are programs that come with a model or are typed by a person: each is tried before it is used.

jinja2's sandbox keeps a template from files and Python's inside, but not from looping forever or filling the memory. So
a template first writes a short chat in a process of its own, with little time and memory. What anybody may type into a
page never runs elsewhere: `written` has such a process write the chat that is meant.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nbtune.errors import DataError

_SECONDS = 10  # on the clock, where _try_template.SECONDS of processor time do not end it: a busy machine, Windows
_LONGEST = 1_000_000  # characters that it may write of a short chat

_ENDLESS = "One short chat keeps it busy without end."
_TOO_MUCH = f"Of a short chat it writes more than {_LONGEST:,} characters."

_QUESTION = {"role": "user", "content": "question"}
_CALL = {"type": "function", "function": {"name": "name", "arguments": {"key": "value"}}}
_TOOL = {"type": "function", "function": {"name": "name", "description": "what", "parameters": {"properties": {}}}}
_CHATS: tuple[dict[str, Any], ...] = (
    {"messages": [_QUESTION, {"role": "assistant", "content": "answer"}, _QUESTION], "add_generation_prompt": True},
    {"messages": [{"role": "system", "content": "be brief"}, _QUESTION], "tools": [_TOOL]},
    {"messages": [_QUESTION, {"role": "assistant", "content": "", "tool_calls": [_CALL]}], "tools": [_TOOL]},
)


def require_bounded(template: str) -> None:
    """Raise DataError where a template does not end, or writes much too much, for a short chat. Takes 0.3 s, once."""
    if why := _unbounded(template):
        raise _refused(why)


def written(template: str, chats: Sequence[Mapping[str, Any]]) -> list[str | DataError]:
    """What a template writes of these chats, each given as the template's variables; an error for one that it refuses.

    It runs in a process of its own, which takes 0.3 s. Raises DataError where it does not end or writes much too much.
    """
    given = len(json.dumps(list(chats)))
    found = _tried(template, chats, _LONGEST + 2 * given)
    if isinstance(found, str):
        raise _refused(found)
    if any("longer" in one for one in found):
        raise _refused(f"Of a chat of {given:,} characters it writes more than {_LONGEST + 2 * given:,}.")
    return [one["text"] if "text" in one else _refusal(one["refused"]) for one in found]


def _refused(why: str) -> DataError:
    return DataError(
        "The chat template does not come to an end",
        why,
        "Mend its loops, or name a standard one: model.chat_template.",
    )


def _refusal(message: str) -> DataError:
    return DataError(
        "The chat template refuses this conversation",
        message,
        "Some templates know no system prompt, or want user and assistant to alternate; one that was edited may be "
        "no valid Jinja.",
    )


@functools.lru_cache(maxsize=64)
def _unbounded(template: str) -> str:
    """Why a template is not to be used; empty where it may be. Raises DataError where it cannot be tried."""
    found = _tried(template, [{"bos_token": "<s>", "eos_token": "</s>", **chat} for chat in _CHATS], _LONGEST)
    if isinstance(found, str):
        return found
    return _TOO_MUCH if any("longer" in one for one in found) else ""


def _tried(template: str, chats: Sequence[Mapping[str, Any]], longest: int) -> list[dict[str, Any]] | str:
    """What _try_template.py prints of each chat, or why the template is not to be used."""
    import jinja2

    path = [str(Path(jinja2.__file__).parents[1])]
    given = {"path": path, "template": template, "chats": list(chats), "longest": longest}
    script = Path(__file__).with_name("_try_template.py")
    try:
        process = subprocess.run(  # noqa: S603 - this interpreter, on a file of this package
            [sys.executable, "-I", str(script)],
            input=json.dumps(given), capture_output=True, text=True, encoding="utf-8", timeout=_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return _ENDLESS
    if process.returncode < 0:  # killed: its time was over
        return _ENDLESS
    if process.returncode > 0:
        raise DataError(
            "The chat template could not be tried",
            f"{sys.executable} ended with status {process.returncode}: {process.stderr.strip()[-200:]}",
            "Choose another template, or mend the installation of Python.",
        )
    found = json.loads(process.stdout)
    return found if found is not None else _TOO_MUCH
