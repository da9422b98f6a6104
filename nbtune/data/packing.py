"""Fill rows of `max_length` tokens with whole examples, and lay rows out as one flat batch without padding."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from nbtune.data.render import Example

IGNORED = -100  # the label of a token that carries no loss


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items of `lengths` into as few bins of `capacity` as best-fit decreasing finds; bins of item indices.

    Items of one length go in the order in which they come. How many bins there are depends on the lengths alone, not on
    their order. Raises ValueError for an item that fits no bin.
    """
    bins: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # by_space[s]: bins with room for s more
    spaces = 0  # bit s is set where by_space[s] is not empty: the tightest fit is one shift and one lowest bit
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        if not 0 < length <= capacity:
            raise ValueError(f"item {index} has length {length}; a bin holds 1 to {capacity}")
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            chosen = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        by_space[space - length].append(chosen)
        spaces |= 1 << (space - length)
    return bins


class Batches:
    """The order in which examples are trained on: (epoch, index) is a complete position in the data.

    A micro-batch is a list of up to `batch_size` rows, a row a list of example indices. With `packing` a row holds as
    many examples as fit into `max_length` tokens, else one. Every epoch has the same number of micro-batches, and each
    example exactly once; the last micro-batch may be smaller.
    """

    def __init__(
        self, examples: Sequence[Example], batch_size: int, max_length: int, *, packing: bool = True, seed: int = 0
    ) -> None:
        self.batch_size = batch_size
        self.max_length = max_length
        self.packing = packing
        self.seed = seed
        self._lengths = [len(example) for example in examples]
        self._rows_per_epoch = len(self._rows(range(len(self._lengths))))

    def __len__(self) -> int:
        """Micro-batches in an epoch."""
        return -(-self._rows_per_epoch // self.batch_size)

    def steps_per_epoch(self, gradient_accumulation_steps: int = 1) -> int:
        """Optimiser steps in an epoch, the last of which may accumulate fewer micro-batches."""
        return -(-len(self) // gradient_accumulation_steps)

    def epoch(self, number: int) -> list[list[list[int]]]:
        """The micro-batches of one epoch; the same for the same seed and number, in any process."""
        order = list(range(len(self._lengths)))
        shuffler = random.Random(f"nbtune:{self.seed}:{number}")  # noqa: S311 - an order, not a secret
        shuffler.shuffle(order)
        rows = self._rows(order)
        shuffler.shuffle(rows)  # packing sorts by length; the rows must not come longest first
        return [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]

    def in_order(self) -> Iterator[list[list[int]]]:
        """The micro-batches of an evaluation: not shuffled, packed alike."""
        rows = self._rows(range(len(self._lengths)))
        for start in range(0, len(rows), self.batch_size):
            yield rows[start : start + self.batch_size]

    def _rows(self, order: Sequence[int]) -> list[list[int]]:
        if not self.packing:
            return [[index] for index in order]
        return [[order[i] for i in row] for row in pack([self._lengths[index] for index in order], self.max_length)]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples laid end to end in one flat row. Labels are not shifted: the loss shifts them within each segment."""

    input_ids: torch.Tensor  # int64 [1, T]
    labels: torch.Tensor  # int64 [1, T]; IGNORED where no loss, and always at a segment's first token
    position_ids: torch.Tensor  # int64 [1, T], from 0 in every segment
    cu_seq_lens: torch.Tensor  # int32 [segments + 1]: segment i is tokens cu_seq_lens[i] to cu_seq_lens[i + 1]
    max_length: int  # tokens of the longest segment

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]

    def to(self, device: str | torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.cu_seq_lens.to(device, non_blocking=True),
            self.max_length,
        )


def collate(rows: Sequence[Sequence[Example]]) -> Batch:
    """Lay the examples of `rows` end to end; a row is only where packing put a border, the model sees segments."""
    import numpy as np
    import torch

    examples = [example for row in rows for example in row]
    lengths = [len(example) for example in examples]
    borders = [0, *itertools.accumulate(lengths)]
    labels = np.concatenate([example.labels for example in examples])
    labels[borders[:-1]] = IGNORED  # the token before it belongs to another example, or to none
    return Batch(
        input_ids=torch.from_numpy(np.concatenate([e.input_ids for e in examples])).long()[None],
        labels=torch.from_numpy(labels).long()[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        cu_seq_lens=torch.tensor(borders, dtype=torch.int32),
        max_length=max(lengths),
    )
