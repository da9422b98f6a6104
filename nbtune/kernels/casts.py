"""Tensors in the precision of the computation; trained ones are cast once for all forward passes of a step.

A cast of a trained tensor cannot be kept until its tensor changes, since nothing tells that: torch's fused optimisers
do not count up a tensor's version. So whoever takes the steps says how long the values stay; whoever only generates
hands in `Casts` of its own, which stay for as long as the weights do.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import Parameter

# What was made, with the tensors that it was made of, whose ids must not be used again.
Casts = dict[Hashable, tuple[tuple[Tensor, ...], Tensor]]

_kept: ContextVar[Casts | None] = ContextVar("casts", default=None)


@contextmanager
def casts_kept(casts: Casts | None = None) -> Iterator[None]:
    """Inside, in this thread, each tensor is cast once; its values must not change. `casts` holds earlier ones."""
    token = _kept.set({} if casts is None else casts)
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
    return kept((id(tensor), dtype), (tensor,), lambda: tensor.detach().to(dtype))


def joined(tensors: Sequence[Tensor], dim: int, dtype: torch.dtype, scales: Sequence[float] | None = None) -> Tensor:
    """The tensors one after the other along `dim`, each times its scale, cast, without a gradient."""

    def make() -> Tensor:
        scaled = tensors if scales is None else [scale * t for scale, t in zip(scales, tensors, strict=True)]
        return torch.cat([tensor.detach().to(dtype) for tensor in scaled], dim)

    if not all(isinstance(tensor, Parameter) for tensor in tensors):  # made anew each time: it would pile up
        return make()
    return kept((*map(id, tensors), dim, dtype, None if scales is None else tuple(scales)), tensors, make)


def kept(key: Hashable, of: Sequence[Tensor], make: Callable[[], Tensor]) -> Tensor:
    """What `make` makes of these tensors: the one last made for the key, where it was of the same tensors."""
    values = _kept.get()
    if values is None:
        return make()
    found = values.get(key)
    if found is None or len(found[0]) != len(of) or any(a is not b for a, b in zip(found[0], of, strict=True)):
        found = values[key] = tuple(of), make()
    return found[1]


def autocast(x: Tensor) -> Tensor:
    """X as torch's autocast, which does not reach into an autograd function, would cast it."""
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
