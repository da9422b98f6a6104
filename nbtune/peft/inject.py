"""Putting adapters into a model and taking them out again.

An adapter is built and filled before it is attached, so that whatever fails leaves the model as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

from nbtune.errors import AdapterError
from nbtune.peft.config import LayerConfig
from nbtune.peft.layer import BASE, ActiveAdapters, Adapter, AdapterLayer, SavedModule
from nbtune.peft.methods import adapter_class
from nbtune.peft.targets import matching, saved_modules, walk


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Every adapted layer with its path in the unadapted model."""
    for path, place in walk(model).items():
        layer = place.parent._modules[place.attribute]
        if isinstance(layer, AdapterLayer):
            yield path, layer


def build(model: nn.Module, config: LayerConfig) -> dict[str, Adapter]:
    """New adapters by module path for a resolved config, not yet in the model.

    Raises AdapterError where the method cannot adapt a module that the config names.
    """
    places = walk(model)
    kind = adapter_class(config)
    adapters: dict[str, Adapter] = {}
    for path in matching(config, places):
        base_layer = places[path].module
        _check_base(kind, config, path, base_layer)
        adapters[path] = kind.create(base_layer, config, path)
    saved = saved_modules(config, places)
    for path in saved:
        if path in adapters or any(path.startswith(f"{other}.") for other in saved):
            message = f"{path} is to be saved whole, and is adapted or inside another module that is saved whole."
            raise AdapterError("A module is named twice", message, "Name it in modules_to_save or in target_modules.")
        adapters[path] = SavedModule(copy.deepcopy(places[path].module))
    for adapter in adapters.values():
        adapter.requires_grad_(not config.inference_mode)
    return adapters


def _check_base(kind: type[Adapter], config: LayerConfig, path: str, base_layer: nn.Module) -> None:
    if not isinstance(base_layer, kind.bases):
        can = ", ".join(base.__name__ for base in kind.bases)
        message = f"{path} is a {type(base_layer).__name__}; {config.peft_type} adapts {can}."
        raise AdapterError(
            "Wrong kind of module", message, "Leave it out of target_modules, or name it in exclude_modules."
        )
    weight = base_layer.weight
    if isinstance(weight, torch.Tensor) and not weight.is_floating_point():
        holds = f"{path} ({type(base_layer).__name__}) holds {weight.dtype} weights"
        message = f"{holds}; {config.peft_type} cannot adapt them yet."
        raise AdapterError("Quantised module", message, "Load the model in bfloat16 or float32.")


def attach(model: nn.Module, state: ActiveAdapters, name: str, adapters: dict[str, Adapter]) -> None:
    """Put the adapters into the model's layers under one name."""
    places = walk(model)
    for path, adapter in adapters.items():
        place = places[path]
        layer = place.parent._modules[place.attribute]
        if not isinstance(layer, AdapterLayer):
            layer = AdapterLayer(place.module, state)
            layer.train(place.module.training)
            setattr(place.parent, place.attribute, layer)
        adapter.train(layer.training)
        layer.add(name, adapter)


def detach(model: nn.Module, name: str) -> None:
    """Take one adapter out; a layer without adapters gives way to its base layer."""
    for place in walk(model).values():
        layer = place.parent._modules[place.attribute]
        if not isinstance(layer, AdapterLayer):
            continue
        if name in layer.adapters:
            layer.remove(name)
        if not layer.adapters:
            setattr(place.parent, place.attribute, layer.base_layer)


def check_name(name: str) -> None:
    """Raise AdapterError for a name that cannot be part of a parameter's name or a folder's."""
    if not name or any(character in name for character in "./\\") or name == BASE or hasattr(nn.ModuleDict, name):
        remedy = "Use letters, digits, - and _, and no name that torch.nn.Module uses itself."
        raise AdapterError("Invalid adapter name", f"{name!r} cannot name an adapter.", remedy)
