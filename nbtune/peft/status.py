"""What adapters a model has, and in which state: PEFT's `get_layer_status` and `get_model_status`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

from torch import nn

from nbtune.modules import quantised
from nbtune.peft.inject import adapter_layers
from nbtune.peft.layer import AdapterLayer
from nbtune.peft.model import PeftModel

RequiresGrad = bool | Literal["irregular"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Status:
    """`requires_grad` and `devices` are by the adapter's name; irregular: true of a part of it."""

    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, RequiresGrad]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunerLayerStatus(_Status):
    """One adapted layer."""

    name: str
    module_type: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunerModelStatus(_Status):
    """A model with adapters. All its layers share one state, so that unlike in PEFT they cannot disagree."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of each adapted layer of a PeftModel or of its base model, in the model's order."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return [_layer_status(path, layer) for path, layer in adapter_layers(base)]


def _layer_status(path: str, layer: AdapterLayer) -> TunerLayerStatus:
    adapters = dict(layer.adapters.items())
    held = layer._original[0] if layer._original else layer.base_layer
    return TunerLayerStatus(
        name=path,
        module_type=" + ".join(dict.fromkeys(type(adapter).__name__ for adapter in adapters.values())),
        enabled=layer.state.enabled,
        active_adapters=list(layer.state.active),
        merged_adapters=[name for name in layer.state.merged if name in adapters],
        requires_grad={name: _trained(adapter.parameters()) for name, adapter in adapters.items()},
        available_adapters=sorted(adapters),
        devices={name: sorted({p.device.type for p in adapter.parameters()}) for name, adapter in adapters.items()},
        quantization_backend=f"bnb {quantised.kind(held)}" if quantised.is_quantised(held) else None,
    )


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of a PeftModel, or of a base model with adapters, as one."""
    adapted = model if isinstance(model, PeftModel) else PeftModel(model)
    trainable, total = adapted.get_nb_trainable_parameters()
    layers, names = get_layer_status(adapted), list(adapted.peft_config)
    parameters = {name: [p for a in adapted._adapters(name).values() for p in a.parameters()] for name in names}
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
        requires_grad={name: _trained(own) for name, own in parameters.items()},
        available_adapters=sorted(names),
        devices={name: sorted({p.device.type for p in own}) for name, own in parameters.items()},
        quantization_backend=next((layer.quantization_backend for layer in layers if layer.quantization_backend), None),
    )


def _trained(parameters: Iterable[nn.Parameter]) -> RequiresGrad:
    trained = {parameter.requires_grad for parameter in parameters}
    return "irregular" if len(trained) > 1 else trained == {True}
