"""Matrices C with few values [n] at fixed places [2, n], the rows and the columns of the values."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def scattered(values: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix C of this shape."""
    rows, columns = places.long()
    return values.new_zeros(shape).index_put((rows, columns), values)


def sparse_product(x: Tensor, values: Tensor, places: Tensor, size: int) -> Tensor:
    """Return x C^T [..., size] for x [..., columns], in the precision of the values or of x, whichever is wider."""
    rows, columns = places
    taken = x.index_select(-1, columns) * values  # [..., n]
    return taken.new_zeros(*x.shape[:-1], size).index_add(-1, rows, taken)


def random_places(shape: tuple[int, int], count: int, seed: int | None, device: torch.device) -> Tensor:
    """Distinct places [2, count] in a matrix of this shape, as PEFT draws them; on the meta device not drawn."""
    if device.type == "meta":
        return torch.empty(2, count, dtype=torch.int64, device=device)
    drawn = _drawn(shape[0] * shape[1], count, seed).to(device)
    return torch.stack([drawn // shape[1], drawn % shape[1]])


@functools.lru_cache(maxsize=16)
def _drawn(entries: int, count: int, seed: int | None) -> Tensor:
    """Distinct numbers [count] below `entries`. Layers of one size share the draw, as a large one takes a second."""
    generator = torch.Generator()  # without a seed, torch starts each at the same place
    if seed is not None:
        generator.manual_seed(seed)
    return torch.randperm(entries, generator=generator)[:count].clone()
