"""How a packed row is cut up for attention: into tiles of like segments, and these into blocks of queries."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

PADDING = 16  # blocks are multiples of it, so that many segments share a tile, and oneDNN compiles few shapes
QUERY_BLOCK = 64  # most queries of a segment in a block: with fewer, fewer hidden keys are multiplied, in more calls
SCORE_BYTES = 4 << 20  # bound on the scores of a block, which are passed over several times while they are in a cache


class Workspace:
    """Memory that is used again by every block: what is allocated and freed in a loop leaves holes in the heap."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """An uninitialised tensor, good until `name` is taken again. A name has one dtype."""
        if (view := self._views.get((name, shape))) is not None:
            return view
        size = math.prod(shape)
        if name not in self._held or len(self._held[name]) < size:
            self._held[name] = torch.empty(size, dtype=dtype, device=self._device)
            self._views = {key: view for key, view in self._views.items() if key[0] != name}
        view = self._views[name, shape] = self._held[name][:size].view(shape)
        return view


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
    source: np.ndarray | None
    target: np.ndarray
    padding: np.ndarray

    def load(self, row: Tensor) -> Tensor:
        """The tensor [T, ...] padded; padding repeats a segment's first token."""
        return row if self.source is None else row.index_select(0, _index(self.source, row.device))

    def load_with_zeros(self, row: Tensor) -> Tensor:
        """The tensor [T, ...] padded with zeros."""
        return row if self.source is None else self.load(row).index_fill_(0, _index(self.padding, row.device), 0)

    def store(self, padded: Tensor) -> Tensor:
        """The tensor [T, ...] of a padded one."""
        return padded if self.source is None else padded.index_select(0, _index(self.target, padded.device))


def _index(numbers: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(numbers).to(device, non_blocking=True)


@functools.lru_cache(maxsize=16)
def padded_row(borders: tuple[int, ...]) -> PaddedRow:
    """The layout of a row whose segment i is tokens borders[i] to borders[i + 1].

    It is kept, since all layers of a model see the same row, and holds arrays: tensors could be a planner's fake ones.
    """
    segments = [(start, end) for start, end in itertools.pairwise(borders) if end > start]
    padded = sorted((padded_length(end - start), start, end) for start, end in segments)
    groups = tuple((length, len(list(group))) for length, group in itertools.groupby(length for length, _, _ in padded))
    source, target, padding = [], [0] * borders[-1], []
    for length, start, end in padded:
        target[start:end] = range(len(source), len(source) + end - start)
        padding += range(len(source) + end - start, len(source) + length)
        source += [*range(start, end), *[start] * (length - end + start)]
    moved = source != list(range(borders[-1]))
    arrays = (np.array(index, dtype=np.int64) for index in (target, padding))
    return PaddedRow(len(source), groups, np.array(source, dtype=np.int64) if moved else None, *arrays)


@dataclasses.dataclass(frozen=True)
class Tile:
    """Segments of one length that are neighbours in a padded row, and heads, which are computed as one batch.

    The queries of each segment are in blocks of `size`; block i of all segments is one batch.
    """

    start: int
    segments: int
    length: int
    size: int
    heads: slice  # of keys and values

    def keys(self, row: Tensor) -> Tensor:
        """Its part of a padded row [tokens, kv_heads, width], as a view [segments, heads, length, width]."""
        return self._of(row).unflatten(0, (self.segments, self.length)).transpose(1, 2)

    def queries(self, row: Tensor) -> Tensor:
        """Its part of a padded row [tokens, kv_heads, group, ...]; a view [blocks, segments, heads, group, size, ...].

        Its `heads` are those of keys.
        """
        by_segment = self._of(row).unflatten(0, (self.segments, self.length // self.size, self.size))
        return by_segment.transpose(0, 1).movedim(2, 4)

    def _of(self, row: Tensor) -> Tensor:
        return row[self.start : self.start + self.segments * self.length, self.heads]


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
        size = _block_size(length)
        keys = before + length if window is None else min(before + length, window + size)
        head_bytes = group * size * keys * itemsize
        heads = min(kv_heads, max(1, SCORE_BYTES // head_bytes))
        step = max(1, SCORE_BYTES // (head_bytes * kv_heads))
        for first in range(0, count, step):
            for head in range(0, kv_heads, heads):
                some = slice(head, min(head + heads, kv_heads))
                yield Tile(start + first * length, min(step, count - first), length, size, some)
        start += count * length


def _block_size(length: int) -> int:
    """Queries of a block, for segments of a length that is `padded_length` of something."""
    return length // -(-length // QUERY_BLOCK)


def padded_length(length: int) -> int:
    """The least length that equal blocks of up to `QUERY_BLOCK` queries fill."""
    blocks = -(-length // QUERY_BLOCK)
    return blocks * PADDING * -(-length // (blocks * PADDING))
