"""What adapters a model has, and in which state: PEFT's `get_layer_status` and `get_model_status`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from torch import nn

from nbtune.modules import quantised
from nbtune.peft.inject import adapter_layers
from nbtune.peft.layer import Adapter, AdapterLayer
from nbtune.peft.model import PeftModel

RequiresGrad = bool | Literal["irregular"]


@dataclasses.dataclass(frozen=True)
class TunerLayerStatus:
    """One adapted layer. `requires_grad` and `devices` are by the adapter's name; irregular: true of a part of it."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, RequiresGrad]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclasses.dataclass(frozen=True)
class TunerModelStatus:
    """A model with adapters. All its layers share one state, so that unlike in PEFT they cannot disagree."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, RequiresGrad]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of each adapted layer of a PeftModel or of its base model, in the model's order."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return [_layer_status(path, layer) for path, layer in adapter_layers(base)]


def _layer_status(path: str, layer: AdapterLayer) -> TunerLayerStatus:
    adapters = dict(layer.adapters.items())
    state = layer.state
    held = layer._original[0] if layer._original else layer.base_layer
    return TunerLayerStatus(
        name=path,
        module_type=" + ".join(dict.fromkeys(type(adapter).__name__ for adapter in adapters.values())),
        enabled=state.enabled,
        active_adapters=list(state.active),
        merged_adapters=[name for name in state.merged if name in adapters],
        requires_grad={name: _trained([adapter]) for name, adapter in adapters.items()},
        available_adapters=sorted(adapters),
        devices={name: _devices([adapter]) for name, adapter in adapters.items()},
        quantization_backend=f"bnb {quantised.kind(held)}" if quantised.is_quantised(held) else None,
    )


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of a PeftModel, or of a base model with adapters, as one."""
    adapted = model if isinstance(model, PeftModel) else PeftModel(model)
    trainable, total = adapted.get_nb_trainable_parameters()
    layers = get_layer_status(adapted)
    parts = {name: list(adapted._adapters(name).values()) for name in adapted.peft_config}
    return TunerModelStatus(
        base_model_type=type(adapted.get_base_model()).__name__,
        adapter_model_type=type(adapted).__name__,
        peft_types={name: str(config.peft_type) for name, config in adapted.peft_config.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=adapted._state.enabled,
        active_adapters=adapted.active_adapters,
        merged_adapters=list(adapted._state.merged),
        requires_grad={name: _trained(adapters) for name, adapters in parts.items()},
        available_adapters=sorted(parts),
        devices={name: _devices(adapters) for name, adapters in parts.items()},
        quantization_backend=next((layer.quantization_backend for layer in layers if layer.quantization_backend), None),
    )


def _trained(adapters: Sequence[Adapter | nn.Module]) -> RequiresGrad:
    trained = {parameter.requires_grad for adapter in adapters for parameter in adapter.parameters()}
    return "irregular" if len(trained) > 1 else trained == {True}


def _devices(adapters: Sequence[Adapter | nn.Module]) -> list[str]:
    return sorted({parameter.device.type for adapter in adapters for parameter in adapter.parameters()})
