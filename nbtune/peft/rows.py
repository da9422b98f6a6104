"""Another adapter per row of a batch, computed in one batch.

The rows that one kind of adapter serves form a `Group`, which says how modules.stacked sorts them by adapter.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nbtune.errors import AdapterError


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Some rows of a batch, and which of a list of adapters serves each."""

    which: tuple[int, ...]  # for each row, a number in the list of adapters
    rows: Tensor | None  # [B'] the rows in the batch, or None where they are all its rows, in order
    device: torch.device

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


class Rows:
    """The adapter of every row of a batch, for one forward pass or one generation."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.distinct = tuple(dict.fromkeys(names))
        self._groups: dict[Any, Group] = {}

    def group(self, names: Sequence[str], x: Tensor, path: str, *, whole: bool = False) -> Group:
        """The rows of x [B, ...] that these adapters serve, or all rows (`whole`), the others numbered -1."""
        key = (tuple(names), x.shape[0], x.device, whole)
        if key not in self._groups:
            self._groups[key] = self._make(tuple(names), x, path, whole)
        return self._groups[key]

    def _make(self, names: tuple[str, ...], x: Tensor, path: str, whole: bool) -> Group:
        # Generation repeats each row for its beams, and a router flattens rows to tokens: both side by side. But an
        # expert among others gets any number of tokens, of which it does not know the rows.
        rows, repeats = x.shape[0], x.shape[0] // len(self.names)
        if rows != repeats * len(self.names) or (
            x.ndim < 3 and not whole and re.search(r"\.\d+\.(.*\.)?\d+(\.|$)", path)
        ):
            message = f"adapter_names has {len(self.names)} names, but {path} got an input of shape {tuple(x.shape)}."
            raise AdapterError(
                "Rows and adapters differ", message, "Give one name per row, and rows as [batch, tokens]."
            )
        numbers = {name: number for number, name in enumerate(names)}
        which = [numbers.get(name, -1) for name in self.names for _ in range(repeats)]
        if whole or -1 not in which:
            return Group(tuple(which), None, x.device)
        mine = [row for row, number in enumerate(which) if number >= 0]
        return Group(tuple(which[row] for row in mine), torch.tensor(mine, device=x.device), x.device)
