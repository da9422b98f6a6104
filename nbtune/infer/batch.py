"""Answers that are written together: one forward pass and one key-value cache for all, whatever adapter each row has.

Rows are padded on the left, so that all of them write at the right edge. A row that has ended leaves the batch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

from nbtune._transformers import DynamicCache
from nbtune.infer.sampling import Sampler
from nbtune.infer.text import TextStream

PIECE = 256  # tokens of each row that are read at once: between two pieces a stop is heard, and others are written

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

    def __init__(
        self,
        column: str,
        prompt: list[int],
        sampler: Sampler,
        text: TextStream,
        limits: Limits,
        beside: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.column = column
        # What the prompt is read with: [1, T], or pictures one after the other.
        self.beside = {name: tensor.to(sampler.generator.device) for name, tensor in (beside or {}).items()}
        self.ids = torch.tensor([prompt], device=sampler.generator.device)  # [1, T]: the prompt and the answer so far
        self.stats = Stats(prompt_tokens=len(prompt))
        self.left = False  # set where nobody waits for it any more: its row leaves the batch
        self._sampler, self._text, self._limits = sampler, text, limits

    @property
    def pictures(self) -> tuple[int, ...] | None:
        """The shape of its pictures, which rows of one batch have in common."""
        return tuple(self.beside["pixel_values"].shape) if self.beside else None

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
        whole: Whether a prompt must be read in one forward pass, as must those after a trained prompt.
    """

    def __init__(
        self,
        forward: Forward,
        answers: list[Answer],
        cache: DynamicCache,
        *,
        prompted: bool = False,
        whole: bool = False,
    ) -> None:
        self.answers = answers
        self._forward, self._cache, self._prompted = forward, cache, prompted
        self._reading = 0.0  # seconds of the pieces before the last
        self._began = False  # whether each row has written a token
        lengths = [answer.ids.shape[1] for answer in answers]
        ids = answers[0].ids.new_zeros(len(answers), max(lengths))
        mask = torch.zeros_like(ids)
        for row, (answer, length) in enumerate(zip(answers, lengths, strict=True)):
            ids[row, -length:] = answer.ids
            mask[row, -length:] = 1
        self._unread, self._mask = ids, mask  # [B, U], what is not in the cache yet; [B, T], 1 where a token is
        self._positions = (mask.cumsum(1) - 1).clamp(min=0)  # [B, U]
        self._beside = _joined([answer.beside for answer in answers], lengths)
        self._piece = max(lengths) if whole or prompted else PIECE

    @property
    def reads(self) -> bool:
        """Whether `read` must be called before the next `turn`."""
        return self._unread.shape[1] > self._piece

    def read(self) -> None:
        """Take in the next piece of the prompts, unless nobody waits for an answer any more."""
        if all(answer.left for answer in self.answers):
            self.answers.clear()
            return
        began = time.perf_counter()
        self._advance(self._piece)
        self._reading += time.perf_counter() - began

    def turn(self) -> Iterator[Delta]:
        """One token of every row, each when it is asked for."""
        began = time.perf_counter()
        logits = self._advance(self._unread.shape[1])
        seconds = self._reading + time.perf_counter() - began
        self._reading, self._began = 0.0, True
        going = []
        for row, answer in enumerate(tuple(self.answers)):
            delta = answer.take(logits[row : row + 1], seconds)
            if delta.finished or answer.left:
                self.answers.remove(answer)
            else:
                going.append(row)
            yield delta
        self._keep(going)

    def _advance(self, tokens: int) -> Tensor:
        """Read so many tokens of each row. Returns the logits after them."""
        left = self._unread.shape[1] - tokens
        mask = self._mask[:, : self._mask.shape[1] - left]
        logits = self._forward(
            [answer.column for answer in self.answers],
            input_ids=self._unread[:, :tokens],
            attention_mask=None if bool(mask.all()) else mask,  # without, attention knows a faster way
            position_ids=self._positions[:, :tokens],
            past_key_values=self._cache,
            **self._beside,
        )
        self._beside = {}
        self._unread = self._unread[:, tokens:]
        self._positions = self._positions[:, tokens:] if left else self._positions
        return logits

    @property
    def _layers(self) -> list[Any]:
        return self._cache.layers

    def can_join(self) -> bool:
        """Whether other rows may join: only a cache that holds every token and no prompt can be padded."""
        return self._began and not self._prompted and all(type(layer) is DynamicLayer for layer in self._layers)

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


def _joined(rows: Sequence[Mapping[str, Tensor]], lengths: Sequence[int]) -> dict[str, Tensor]:
    """What the rows' prompts are read with: of each token [B, T], padded on the left; else one row after the other."""
    longest, found = max(lengths), {}
    for name in rows[0]:
        of_tokens = all(row[name].shape == (1, length) for row, length in zip(rows, lengths, strict=True))
        found[name] = torch.cat(
            [
                pad(row[name], (longest - length, 0)) if of_tokens else row[name]
                for row, length in zip(rows, lengths, strict=True)
            ]
        )
    return found
