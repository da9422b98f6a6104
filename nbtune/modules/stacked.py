"""Modules that are alike, computed at once: their tensors are stacked, and torch.vmap does the rest.

An equation that is written for one module, and that runs under torch.vmap, thus serves a batch of several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class _Call(nn.Module):
    """Makes any function of a module a module's forward, whose parameters torch.func can replace."""

    def __init__(self, function: Callable[..., Tensor], module: nn.Module) -> None:
        super().__init__()
        self.function, self.module = function, module

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self.module, *inputs)


def stacked(
    function: Callable[..., Tensor], modules: Sequence[nn.Module], table: Tensor, place: Tensor, *inputs: Tensor
) -> Tensor:
    """`function(module, *inputs)` for inputs [B, ...], another module per row.

    `table` [modules, n] has the rows of each module, short lists filled up with repeats, and `place` [B] each row's
    place in it. The modules have the same shapes and settings. A tensor that they share is not stacked.
    """
    states = [{**dict(module.named_parameters()), **dict(module.named_buffers())} for module in modules]
    tensors, dims = {}, {}
    for name, first in states[0].items():
        shared = all(state[name] is first for state in states)
        tensors[f"module.{name}"] = first if shared else torch.stack([state[name] for state in states])
        dims[f"module.{name}"] = None if shared else 0
    call = _Call(function, modules[0])

    def one(tensors: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        return torch.func.functional_call(call, tensors, inputs)

    mapped = torch.vmap(one, in_dims=(dims, *[0] * len(inputs)), randomness="different")
    out = mapped(tensors, *(x[table] for x in inputs))  # [modules, n, ...]
    return out.flatten(0, 1)[place]
