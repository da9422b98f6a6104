"""A request to OpenAI's chat completions, and its answer: whole, or as server-sent events.

The fields are those that OpenAI's Python client sends and reads. Without a web server: see nbtune.infer.server.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nbtune.errors import NbtuneError
from nbtune.infer.batch import Stats
from nbtune.infer.sampling import Sampling
from nbtune.infer.scheduler import BusyError, ModelFailedError, Scheduler

LONGEST_ANSWER = 512  # tokens, where a request does not say
REASONS = {"end_of_turn": "stop", "max_new_tokens": "length", "context": "length", "stopped": "stop"}


class RefusedError(Exception):
    """Why there is no answer: an HTTP status, and the API's error object."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": code}}

    @classmethod
    def of(cls, error: NbtuneError) -> RefusedError:
        text = " ".join(str(error).splitlines())
        if isinstance(error, BusyError):
            return cls(503, text, "busy")
        if isinstance(error, ModelFailedError):
            return cls(500, text, "model_failed")
        return cls(400, text, "invalid_request")


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None

    def as_dict(self) -> dict[str, str]:
        parts = self.content if isinstance(self.content, list) else []
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """What is asked. Settings that would change the answer and are not known here are refused, not ignored."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0, lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    user: str | None = None  # as the API has it, of no effect
    metadata: dict[str, str] | None = None  # the same
    store: Literal[False] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else [text for text in self.stop or [] if text]

    def sampling(self, defaults: Sampling) -> Sampling:
        """What it says, over the defaults. Raises NbtuneError where a value is out of range."""
        given = {name: getattr(self, name) for name in Sampling.model_fields}
        return Sampling.of(
            **{**defaults.model_dump(), **{key: value for key, value in given.items() if value is not None}}
        )


class Completion:
    """One answer of the API."""

    def __init__(self, asked: ChatRequest, scheduler: Scheduler) -> None:
        self._asked = asked
        self._facts = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": asked.model}
        self._request = scheduler.request(
            asked.model,
            [message.as_dict() for message in asked.messages],
            asked.sampling(scheduler.engine.base_of(asked.model).defaults.sampling),
            max_new_tokens=asked.max_completion_tokens or asked.max_tokens or LONGEST_ANSWER,
            seed=asked.seed,
        )

    def begin(self) -> None:
        """Hand the request in. Raises NbtuneError where it cannot be answered."""
        self._deltas = self._request.__enter__()

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        self.begin()
        try:
            pieces = list(self._pieces())
        finally:
            self._request.__exit__(None, None, None)
        _, reason, stats = pieces[-1]
        message = {"role": "assistant", "content": "".join(text for text, *_ in pieces)}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return {**self._facts, "object": "chat.completion", "choices": [choice], "usage": _usage(stats)}

    def stream(self) -> Iterator[str]:
        """Server-sent events; closed early, the answer ends."""
        try:
            yield self._event({"role": "assistant", "content": ""})
            usage = _usage(Stats(0))
            for text, reason, stats in self._pieces():
                usage = _usage(stats)
                if text:
                    yield self._event({"content": text})
                if reason is not None:
                    yield self._event({}, reason)
            if self._asked.stream_options is not None and self._asked.stream_options.include_usage:
                yield _sent({**self._facts, "object": "chat.completion.chunk", "choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        except NbtuneError as error:  # the status is sent already
            yield _sent(RefusedError.of(error).body)
        finally:
            self._request.__exit__(None, None, None)

    def _pieces(self) -> Iterator[tuple[str, str | None, Stats]]:
        """Text to append, why it ended (in the last piece), and the count so far."""
        text, given = "", 0
        longest = max((len(stop) for stop in self._asked.stops), default=0)
        for delta in self._deltas:
            text += delta.text
            end = min((at for stop in self._asked.stops if (at := text.find(stop)) >= 0), default=-1)
            if end >= 0:
                yield text[given:end], "stop", delta.stats
                return
            # What may be the beginning of a stop is kept back.
            safe = len(text) if delta.finished else max(given, len(text) - longest + 1) if longest else len(text)
            yield text[given:safe], REASONS[delta.finished] if delta.finished else None, delta.stats
            given = safe

    def _event(self, delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _sent({**self._facts, "object": "chat.completion.chunk", "choices": [choice]})


def _sent(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values)}\n\n"


def _usage(stats: Stats) -> dict[str, int]:
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.tokens,
        "total_tokens": stats.prompt_tokens + stats.tokens,
    }
