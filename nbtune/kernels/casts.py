"""Tensors in the precision of the computation; trained ones are cast once for all forward passes of a step.

A cast of a trained tensor cannot be kept until its tensor changes, since nothing tells that: torch's fused optimisers
do not count up a tensor's version. So whoever takes the steps says how long the values stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_kept: ContextVar[dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] | None] = ContextVar("casts", default=None)


@contextmanager
def casts_kept() -> Iterator[None]:
    """Inside, in this thread, each tensor is cast once; its values must not change."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of `tensor` in `dtype`, without a gradient."""
    if tensor.dtype is dtype:
        return tensor.detach()
    kept = _kept.get()
    if kept is None:
        return tensor.detach().to(dtype)
    key = id(tensor), dtype
    if key not in kept:
        kept[key] = tensor, tensor.detach().to(dtype)  # with the tensor itself, whose id must not be used again
    return kept[key][1]


def autocast(x: Tensor) -> Tensor:
    """X as torch's autocast, which does not reach into an autograd function, would cast it."""
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
