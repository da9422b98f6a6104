"""Gated MLPs: a module of three linear layers and an activation that computes down(act(gate(x)) * up(x))."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from nbtune.fused.linear import described
from nbtune.kernels.casts import autocast
from nbtune.kernels.gated import ACTIVATIONS
from nbtune.kernels.lora_mlp import lora_mlp
from nbtune.modules.base import LINEARS, features
from nbtune.peft.layer import AdapterLayer


class FusedMlp:
    """The forward pass of a gated MLP."""

    kind = "mlp"

    def __init__(self, module: nn.Module, first: tuple[str, ...], down: str, activation: str) -> None:
        self.module, self.original = module, module.forward
        self.first, self.down = first, down  # the names of gate and up, or of both in one; and of down
        self.activation = activation

    def __call__(self, x: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        modules: Any = self.module._modules
        first = [described(modules[name]) for name in self.first]
        down = described(modules[self.down])
        if None in first or down is None or args or kwargs:
            return self.original(x, *args, **kwargs)
        return lora_mlp(autocast(x), first, down, self.activation)  # pyright: ignore[reportArgumentType]


def fused_mlps(module: nn.Module) -> list[FusedMlp]:
    """How the module may be computed, if it is built like a gated MLP: with either of two layers as the gate."""
    sizes = {name: size for name, child in module.named_children() if (size := _sizes(child)) is not None}
    others = [child for name, child in module.named_children() if name not in sizes and not _idle(child)]
    functions = [activation_of(child) for child in others]
    if len(functions) != 1 or functions[0] is None:
        return []
    orders = itertools.permutations(sizes)
    if len(sizes) == 3:
        found = [o for o in orders if sizes[o[0]] == sizes[o[1]] == sizes[o[2]][::-1]]
    elif len(sizes) == 2:
        found = [o for o in orders if sizes[o[0]] == (2 * sizes[o[1]][1], sizes[o[1]][0])]
    else:
        found = []
    return [FusedMlp(module, order[:-1], order[-1], functions[0]) for order in found]


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    base = module.base_layer if isinstance(module, AdapterLayer) else module
    return features(base) if isinstance(base, LINEARS) else None


def _idle(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


def activation_of(module: nn.Module) -> str | None:
    """The name of the activation that a module without parameters computes, told by its values."""
    if any(True for _ in module.parameters()) or any(True for _ in module.children()):
        return None
    x = torch.linspace(-6, 6, 97)
    try:
        y = module(x)
    except (TypeError, RuntimeError, ValueError):  # it takes something else than one tensor
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    return next((name for name, f in ACTIVATIONS.items() if torch.allclose(f(x), y, rtol=0, atol=1e-6)), None)
