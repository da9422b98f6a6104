"""Answers that are written together: one forward pass and one key-value cache for all, whatever adapter each row has.

Rows are padded on the left, so that all of them write at the right edge. A row that has ended leaves the batch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

from nbtune._transformers import DynamicCache
from nbtune.infer.sampling import Sampler
from nbtune.infer.text import TextStream

Finish = Literal["end_of_turn", "max_new_tokens", "context", "stopped"]


@dataclasses.dataclass(frozen=True)
class Stats:
    """What one answer cost. Seconds are those of its batch, whose rows are written at the same time."""

    prompt_tokens: int
    tokens: int = 0  # generated, the end of turn included
    first_token_seconds: float = 0.0  # reading the prompt and choosing the first token
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token; 0 before there is a second one."""
        after = self.seconds - self.first_token_seconds
        return (self.tokens - 1) / after if self.tokens > 1 and after > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Delta:
    """One token of one column."""

    column: str
    text: str  # to append to what this column said before; may be empty
    stats: Stats
    finished: Finish | None = None  # set in the last delta of a column
    token: int | None = None  # None where a column was stopped before its turn


@dataclasses.dataclass(frozen=True)
class Limits:
    """Where an answer ends."""

    stop_tokens: frozenset[int]
    max_new_tokens: int
    context: int  # tokens of prompt and answer


class Answer:
    """One column's answer while it is written."""

    def __init__(self, column: str, prompt: list[int], sampler: Sampler, text: TextStream, limits: Limits) -> None:
        self.column = column
        self.ids = torch.tensor([prompt], device=sampler.generator.device)  # [1, T]: the prompt and the answer so far
        self.stats = Stats(prompt_tokens=len(prompt))
        self.left = False  # set where nobody waits for it any more: its row leaves the batch
        self._sampler, self._text, self._limits = sampler, text, limits

    def take(self, logits: Tensor, seconds: float) -> Delta:
        """Choose one token. logits: [1, V] in float32, made in `seconds`."""
        began = time.perf_counter()
        with torch.inference_mode():
            token = self._sampler(self.ids, logits)
            self.ids = torch.cat([self.ids, self.ids.new_tensor([[token]])], dim=1)
        self._count(seconds + time.perf_counter() - began)
        finished = self._finish(token)
        text = "" if finished == "end_of_turn" else self._text.add(token)
        if finished:
            text += self._text.rest()
        return Delta(self.column, text, self.stats, finished, token)

    def stopped(self) -> Delta:
        return Delta(self.column, self._text.rest(), self.stats, "stopped")

    def _count(self, seconds: float) -> None:
        self.stats = dataclasses.replace(
            self.stats,
            tokens=self.stats.tokens + 1,
            first_token_seconds=self.stats.first_token_seconds or seconds,
            seconds=self.stats.seconds + seconds,
        )

    def _finish(self, token: int) -> Finish | None:
        if token in self._limits.stop_tokens:
            return "end_of_turn"
        if self.stats.tokens >= self._limits.max_new_tokens:
            return "max_new_tokens"
        return "context" if self.ids.shape[1] >= self._limits.context else None


class Forward(Protocol):
    def __call__(self, columns: list[str], **inputs: Any) -> Tensor:
        """Logits of each row's next token [B, V] in float32; `columns` names what answers in each row."""
        ...


class Batch:
    """Rows that one forward pass serves.

    Args:
        forward: Runs the model.
        answers: To be written, a row each.
        cache: An empty one.
        prompted: Whether a trained prompt comes before each text. In the cache it lies before the padding.
    """

    def __init__(self, forward: Forward, answers: list[Answer], cache: DynamicCache, *, prompted: bool = False) -> None:
        self.answers = answers
        self._forward, self._cache, self._prompted = forward, cache, prompted
        lengths = [answer.ids.shape[1] for answer in answers]
        ids = answers[0].ids.new_zeros(len(answers), max(lengths))
        mask = torch.zeros_like(ids)
        for row, (answer, length) in enumerate(zip(answers, lengths, strict=True)):
            ids[row, -length:] = answer.ids
            mask[row, -length:] = 1
        self._unread, self._mask = ids, mask  # [B, U], what is not in the cache yet; [B, T], 1 where a token is
        self._positions = (mask.cumsum(1) - 1).clamp(min=0)  # [B, U]

    def turn(self) -> Iterator[Delta]:
        """One token of every row, each when it is asked for."""
        began = time.perf_counter()
        padded = not bool(self._mask.all())
        logits = self._forward(
            [answer.column for answer in self.answers],
            input_ids=self._unread,
            attention_mask=self._mask if padded else None,  # without, attention knows a faster way
            position_ids=self._positions,
            past_key_values=self._cache,
        )
        seconds = time.perf_counter() - began
        going = []
        for row, answer in enumerate(tuple(self.answers)):
            delta = answer.take(logits[row : row + 1], seconds)
            if delta.finished or answer.left:
                self.answers.remove(answer)
            else:
                going.append(row)
            yield delta
        self._keep(going)

    @property
    def _layers(self) -> list[Any]:
        return self._cache.layers

    def can_join(self) -> bool:
        """Whether other rows may join: only a cache that holds every token and no prompt can be padded."""
        return not self._prompted and all(type(layer) is DynamicLayer for layer in self._layers)

    def join(self, other: Batch) -> None:
        """Take in the rows of another batch of the same model; both have written their first token."""
        longer = max(self._mask.shape[1], other._mask.shape[1])
        for batch in (self, other):
            batch._pad(longer - batch._mask.shape[1])
        for layer, of_other in zip(self._layers, other._layers, strict=True):
            layer.keys = torch.cat([layer.keys, of_other.keys])
            layer.values = torch.cat([layer.values, of_other.values])
        self.answers += other.answers
        self._mask = torch.cat([self._mask, other._mask])
        self._positions = torch.cat([self._positions, other._positions])
        self._unread = torch.cat([self._unread, other._unread])

    def _pad(self, count: int) -> None:
        """Put so many places that hold nothing before every row."""
        if not count:
            return
        self._mask = pad(self._mask, (count, 0))
        for layer in self._layers:
            layer.keys = pad(layer.keys, (0, 0, count, 0))  # [B, heads, T, head_dim]
            layer.values = pad(layer.values, (0, 0, count, 0))

    def _trim(self) -> None:
        """Take away the places before the longest row: a batch that others keep joining would grow for ever."""
        empty = int(self._mask.argmax(1).min())
        if not empty or not self.can_join():
            return
        self._mask = self._mask[:, empty:]
        for layer in self._layers:
            layer.keys, layer.values = layer.keys[:, :, empty:], layer.values[:, :, empty:]

    def _keep(self, rows: list[int]) -> None:
        """Go on with these rows, each with the token that it has just written."""
        if not rows:
            return
        if len(rows) < len(self._mask):
            index = torch.tensor(rows, device=self._mask.device)
            self._cache.batch_select_indices(index)
            self._mask, self._positions = self._mask[index], self._positions[index]
            self._trim()
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(rows), 1)], dim=1)
        self._positions = self._positions[:, -1:] + 1
        self._unread = torch.cat([answer.ids[:, -1:] for answer in self.answers])
