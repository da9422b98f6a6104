"""Rows of a batch that one kind of adapter serves, sorted by adapter as `stacked.py` computes them."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Some rows of a batch, and which of a list of adapters serves each."""

    which: tuple[int, ...]  # for each row, a number in the list of adapters
    rows: Tensor | None  # [B'] the rows in the batch, or None where they are all its rows, in order
    device: torch.device
    total: int  # rows of the batch

    def select(self, x: Tensor) -> Tensor:
        """The group's rows of x [B, ...]."""
        return x if self.rows is None else x[self.rows]

    def put(self, x: Tensor, part: Tensor) -> Tensor:
        """X [B, ...] with the group's rows replaced."""
        if self.rows is None:
            return part
        return x.index_copy(0, self.rows, part.to(x.dtype))

    @functools.cached_property
    def index(self) -> Tensor:
        """`which` as a tensor [B']."""
        return torch.tensor(self.which, device=self.device)

    @functools.cached_property
    def of_each(self) -> Tensor:
        """For each row of the batch the number of its adapter, -1 for none, [total]."""
        if self.rows is None:
            return self.index
        return torch.full((self.total,), -1, device=self.device).index_copy(0, self.rows, self.index)

    @functools.cached_property
    def in_order(self) -> bool:
        """Whether row n has adapter n, so that nothing needs to be gathered."""
        return self.which == tuple(range(len(self.which)))

    @functools.cached_property
    def table(self) -> tuple[Tensor, Tensor]:
        """The rows of each adapter [adapters, n], short lists filled up with repeats; and each row's place in it."""
        lists = [
            [row for row, other in enumerate(self.which) if other == number] for number in range(max(self.which) + 1)
        ]
        longest = max(map(len, lists))
        place = {row: number * longest + at for number, rows in enumerate(lists) for at, row in enumerate(rows)}
        full = [rows + rows[:1] * (longest - len(rows)) for rows in lists]
        order = [place[row] for row in range(len(self.which))]
        return torch.tensor(full, device=self.device), torch.tensor(order, device=self.device)

    def rows_of(self, number: int) -> Tensor | None:
        """The rows [n] of one adapter (-1: of none), or None where there are none."""
        rows = [row for row, other in enumerate(self.which) if other == number]
        return torch.tensor(rows, device=self.device) if rows else None
