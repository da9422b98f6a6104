"""A module as a linear layer with low-rank updates, where it is no more than that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nbtune.fused.stretches import Stretches, parts
from nbtune.kernels.casts import autocast
from nbtune.kernels.lora_linear import LoraLinear, Update, lora_linears
from nbtune.modules import quantised
from nbtune.modules.base import LINEARS, weight_of
from nbtune.peft.layer import Adapter, AdapterLayer, Replacement
from nbtune.peft.methods.lora import Lora


def described(module: nn.Module) -> LoraLinear | None:
    """The layer with its active adapters as tensors; None where it computes something else, now or always."""
    if not isinstance(module, AdapterLayer):
        return _of_base(module, ()) if isinstance(module, LINEARS) else None
    state = module.state
    if not isinstance(module.base_layer, LINEARS):
        return None
    if isinstance(state.rows, Stretches):
        places = [(part.name, part.borders, part.draws.generator) for part in state.rows.parts]
    elif state.rows is not None:
        return None
    else:
        places = [(name, None, None) for name in state.applied]
    updates: list[Update] = []
    for name, borders, generator in places:
        for adapter in parts(module.adapters[name]) if name in module.adapters else ():
            terms = _updates(adapter)
            if terms is None:
                return None
            updates += [term._replace(stretch=borders, generator=generator) for term in terms] if borders else terms
    return _of_base(module.base_layer, tuple(updates))


def is_low_rank(adapter: nn.Module) -> bool:
    """Whether an adapter is no more than low-rank updates, also where other adapters are not."""
    return all(_updates(part) is not None for part in parts(adapter))


def _of_base(base: Any, updates: tuple[Update, ...]) -> LoraLinear:
    if quantised.is_quantised(base):
        return LoraLinear(lambda dtype: quantised.dequantised(base, dtype), base.bias, updates)

    def weight(dtype: torch.dtype) -> Tensor:
        return weight_of(base).detach().to(dtype)

    return LoraLinear(weight, base.bias, updates, weight_of(base) if base.weight.requires_grad else None)


def _updates(adapter: Adapter) -> list[Update] | None:
    """A LoRA, also one that subtracts its start, as low-rank updates."""
    if type(adapter) is not Lora or isinstance(adapter, Replacement):
        return None
    if adapter.magnitude is not None or adapter.lora_bias is not None or adapter.base_change is not None:
        return None
    dropout = adapter.dropout if adapter.training else 0.0
    terms = [Update(adapter.lora_A, adapter.lora_B, adapter.scaling, dropout)]
    if adapter.start_A is not None:
        terms.append(Update(adapter.start_A, adapter.start_B, -adapter.scaling))
    return terms


class FusedLinear:
    """The forward pass of a linear layer with adapters."""

    kind = "linear"

    def __init__(self, module: AdapterLayer) -> None:
        self.module, self.original = module, module.forward

    def __call__(self, x: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        layer = described(self.module)
        if layer is None or args or kwargs:
            return self.original(x, *args, **kwargs)
        return lora_linears(autocast(x), [layer])[0]


def fused_linear(module: nn.Module) -> list[FusedLinear]:
    """How the module may be computed, if it is a linear layer with adapters."""
    if isinstance(module, AdapterLayer) and isinstance(module.base_layer, LINEARS):
        return [FusedLinear(module)]
    return []
