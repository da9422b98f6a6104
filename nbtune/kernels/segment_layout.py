"""How a packed row is cut up for attention: into tiles of like segments, and these into blocks of queries."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

PADDING = 16  # segments are padded to a multiple of it, so that many share a tile, and oneDNN compiles few shapes
QUERY_BLOCK = 64  # queries of a segment in a block: with fewer, fewer hidden keys are multiplied, but in more calls
SCORE_BYTES = 2 << 20  # bound on the scores of a block, which are passed over several times while they are in the cache


class Workspace:
    """Memory that is used again by every block: what is allocated and freed in a loop leaves holes in the heap."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """An uninitialised tensor, good until `name` is taken again. A name has one dtype."""
        size = math.prod(shape)
        if name not in self._held or len(self._held[name]) < size:
            self._held[name] = torch.empty(size, dtype=dtype, device=self._device)
        return self._held[name][:size].view(shape)


@dataclasses.dataclass(frozen=True)
class PaddedRow:
    """The tokens of a row, its segments sorted by length and padded at their ends.

    Attributes:
        tokens: Tokens of the padded row.
        groups: Padded length and number of the segments that have it, in order.
        source: For each token of the padded row one of the row [tokens]; None where the two are the same.
        target: For each token of the row its place in the padded one [T].
        padding: Tokens of the padded row that stand for none.
    """

    tokens: int
    groups: tuple[tuple[int, int], ...]
    source: Tensor | None
    target: Tensor | None
    padding: Tensor | None

    def load(self, row: Tensor) -> Tensor:
        """The tensor [T, ...] padded; padding repeats a segment's first token."""
        return row if self.source is None else row.index_select(0, self.source)

    def load_with_zeros(self, row: Tensor) -> Tensor:
        """The tensor [T, ...] padded with zeros."""
        if self.source is None or self.padding is None:
            return row
        return row.index_select(0, self.source).index_fill_(0, self.padding, 0)

    def store(self, padded: Tensor) -> Tensor:
        """The tensor [T, ...] of a padded one."""
        return padded if self.target is None else padded.index_select(0, self.target)


@functools.lru_cache(maxsize=16)  # all layers of a model see the same row
def padded_row(borders: tuple[int, ...], device: torch.device) -> PaddedRow:
    """The layout of a row whose segment i is tokens borders[i] to borders[i + 1]."""
    segments = [(start, end) for start, end in itertools.pairwise(borders) if end > start]
    padded = sorted((-(-(end - start) // PADDING) * PADDING, start, end) for start, end in segments)
    groups = tuple((length, len(list(group))) for length, group in itertools.groupby(length for length, _, _ in padded))
    if padded == [(end - start, start, end) for start, end in segments]:
        return PaddedRow(borders[-1], groups, None, None, None)
    source, target, padding = [], [0] * borders[-1], []
    for length, start, end in padded:
        target[start:end] = range(len(source), len(source) + end - start)
        padding += range(len(source) + end - start, len(source) + length)
        source += [*range(start, end), *[start] * (length - end + start)]
    return PaddedRow(len(source), groups, *(torch.tensor(index, device=device) for index in (source, target, padding)))


@dataclasses.dataclass(frozen=True)
class Block:
    """Queries of each segment of a tile, and the keys that they see some of. A prefix's keys come first."""

    queries: slice
    keys: slice


@dataclasses.dataclass(frozen=True)
class Tile:
    """Segments of one length that are neighbours in a padded row, and heads, which are computed as one batch."""

    start: int
    segments: int
    length: int
    heads: slice  # of keys and values
    blocks: tuple[Block, ...]

    def of(self, row: Tensor) -> Tensor:
        """Its part of a padded row [tokens, kv_heads, ...], as a view [segments, length, heads, ...]."""
        part = row[self.start : self.start + self.segments * self.length, self.heads]
        return part.unflatten(0, (self.segments, self.length))


def tiles(row: PaddedRow, kv_heads: int, group: int, before: int, window: int | None, itemsize: int) -> Iterator[Tile]:
    """The tiles of a row, each with scores of up to `SCORE_BYTES` a block (or of one head of one segment).

    Args:
        row: The padded row.
        kv_heads: Heads of keys and values.
        group: Heads of queries that share one of these.
        before: Keys of a prefix that stand before every segment.
        window: Keys that a token sees, up to itself; None for all.
        itemsize: Bytes of a score.
    """
    start = 0
    for length, count in row.groups:
        blocks = tuple(_blocks(length, before, window))
        head_bytes = group * itemsize * max(_size(block.queries) * _size(block.keys) for block in blocks)
        heads = min(kv_heads, max(1, SCORE_BYTES // head_bytes))
        step = max(1, SCORE_BYTES // (head_bytes * kv_heads))
        for first in range(0, count, step):
            segments = min(step, count - first)
            for head in range(0, kv_heads, heads):
                some = slice(head, min(head + heads, kv_heads))
                yield Tile(start + first * length, segments, length, some, blocks)
        start += count * length


def _blocks(length: int, before: int, window: int | None) -> Iterator[Block]:
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        first_seen = 0 if window is None else max(0, before + start - window + 1)
        yield Block(slice(start, end), slice(first_seen // PADDING * PADDING, before + end))


def _size(span: slice) -> int:
    return span.stop - span.start
