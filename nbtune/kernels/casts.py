"""Tensors in the precision of the computation; trained ones are cast once for all forward passes of a step.

A cast of a trained tensor cannot be kept until its tensor changes, since nothing tells that: torch's fused optimisers
do not count up a tensor's version. So whoever takes the steps says how long the values stay; whoever only generates
hands in `Casts` of its own, which stay for as long as the weights do.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# What was made, with the tensors that it was made of, whose ids must not be used again.
Casts = dict[Hashable, tuple[tuple[Tensor, ...], Tensor]]

_kept: ContextVar[Casts | None] = ContextVar("casts", default=None)


@contextmanager
def casts_kept(kept: Casts | None = None) -> Iterator[None]:
    """Inside, in this thread, each tensor is cast once; its values must not change. `kept` holds earlier ones."""
    token = _kept.set({} if kept is None else kept)
    try:
        yield
    finally:
        _kept.reset(token)


def keeps_casts() -> bool:
    """Whether values are kept now."""
    return _kept.get() is not None


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of `tensor` in `dtype`, without a gradient."""
    if tensor.dtype is dtype:
        return tensor.detach()
    kept = _kept.get()
    if kept is None:
        return tensor.detach().to(dtype)
    key = id(tensor), dtype
    if key not in kept:
        kept[key] = (tensor,), tensor.detach().to(dtype)
    return kept[key][1]


def joined(tensors: Sequence[Tensor], dim: int, dtype: torch.dtype) -> Tensor:
    """The tensors one after the other along `dim`, cast, without a gradient."""
    kept = _kept.get()
    key = (*map(id, tensors), dim, dtype)
    if kept is None or key not in kept:
        made = torch.cat([tensor.detach().to(dtype) for tensor in tensors], dim)
        if kept is None:
            return made
        kept[key] = tuple(tensors), made
    return kept[key][1]


def autocast(x: Tensor) -> Tensor:
    """X as torch's autocast, which does not reach into an autograd function, would cast it."""
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
