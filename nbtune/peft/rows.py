"""Another adapter per row of a batch, computed in one batch: the rows that one kind of adapter serves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nbtune.errors import AdapterError
from nbtune.modules.row_groups import Group


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
            return Group(tuple(which), None, x.device, rows)
        mine = [row for row, number in enumerate(which) if number >= 0]
        return Group(tuple(which[row] for row in mine), torch.tensor(mine, device=x.device), x.device, rows)
