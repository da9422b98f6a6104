"""Chat templates are programs that come with a model or are typed by a person: each is tried before it is used.

jinja2's sandbox keeps a template from files and Python's inside, but not from looping forever or filling the memory. So
a template first writes a short chat in a process of its own, with little time and memory.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from nbtune.errors import DataError

_SECONDS = 10  # on the clock, where _try_template.SECONDS of processor time do not end it: a busy machine, Windows
_LONGEST = 1_000_000  # characters that it may write of a short chat

_ENDLESS = "A chat of three short messages keeps it busy without end."
_TOO_MUCH = f"Of a chat of three short messages it writes more than {_LONGEST:,} characters."

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
        raise DataError(
            "The chat template does not come to an end",
            why,
            "Mend its loops, or name a standard one: model.chat_template.",
        )


@functools.lru_cache(maxsize=64)
def _unbounded(template: str) -> str:
    """Why a template is not to be used; empty where it may be. Raises DataError where it cannot be tried."""
    import jinja2

    chats = [{"bos_token": "<s>", "eos_token": "</s>", **chat} for chat in _CHATS]
    given = {"path": [str(Path(jinja2.__file__).parents[1])], "template": template, "chats": chats}
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
    longest = json.loads(process.stdout)
    return "" if longest is not None and longest <= _LONGEST else _TOO_MUCH
