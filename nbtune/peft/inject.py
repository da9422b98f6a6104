"""Putting adapters into a model and taking them out again.

An adapter is built and filled before it is attached, so that whatever fails leaves the model as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from nbtune.errors import AdapterError
from nbtune.modules.base import LINEARS
from nbtune.modules.quantised import is_quantised
from nbtune.modules.structure import refuse_uncalled
from nbtune.peft.config import LayerConfig, PeftConfig, PromptLearningConfig, did_you_mean
from nbtune.peft.layer import BASE, ActiveAdapters, Adapter, AdapterLayer, SavedModule, Several
from nbtune.peft.methods import adapter_class
from nbtune.peft.methods.bias import Bias
from nbtune.peft.methods.experts import LoraExperts
from nbtune.peft.methods.lora import Lora
from nbtune.peft.methods.trainable_tokens import TrainableTokens, token_adapters
from nbtune.peft.prompt import SavedBesidePrompt
from nbtune.peft.targets import Place, matching, saved_modules, walk


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Every adapted layer with its path in the unadapted model."""
    for path, place in walk(model).items():
        layer = place.parent._modules[place.attribute]
        if isinstance(layer, AdapterLayer):
            yield path, layer


def build(model: nn.Module, config: PeftConfig, *, to_fill: bool = False) -> dict[str, Adapter]:
    """New adapters by module path for a resolved config, not yet in the model; `to_fill` with the tensors of a file.

    Raises AdapterError where the method cannot adapt a module that the config names.
    """
    places = walk(model)
    assert isinstance(config, LayerConfig | PromptLearningConfig)
    if isinstance(config, PromptLearningConfig):
        # A file holds what a prompt's encoder made, not the encoder.
        adapters = _prompt(model, config.replace(inference_mode=config.inference_mode or to_fill), places)
    else:
        adapters = _layers(config, places)
        _add_parameters(adapters, config, places)
        _add_biases(adapters, config, places)
        _add_tokens(model, adapters, config, places)
    _add_saved_modules(adapters, config, places)
    for adapter in adapters.values():
        adapter.requires_grad_(not config.inference_mode)
    return adapters


def _layers(config: LayerConfig, places: dict[str, Place]) -> dict[str, Adapter]:
    kind = adapter_class(config)
    bases = {path: places[path].module for path in matching(config, places)}
    for path, base in bases.items():
        _check_base(kind, config, path, base)
    refuse_uncalled({path: place.module for path, place in places.items()}, bases)
    shared = kind.share(config, bases)
    return {path: kind.create(base, config, path, shared) for path, base in bases.items()}


def _check_base(kind: type[Adapter], config: PeftConfig, path: str, base: nn.Module) -> None:
    if not isinstance(base, kind.bases):
        can = ", ".join(known.__name__ for known in kind.bases)
        message = f"{path} is a {type(base).__name__}; {config.peft_type} adapts {can}."
        raise AdapterError("Wrong kind of module", message, "Leave it out, or name it in exclude_modules.")
    weight = base._parameters.get("weight")
    if weight is not None and not weight.is_floating_point() and not is_quantised(base):
        message = f"{path} ({type(base).__name__}) holds {weight.dtype} weights; {config.peft_type} cannot adapt them."
        raise AdapterError("Unknown quantisation", message, "Load the model in 4 or 8 bit with bitsandbytes, or whole.")


def _add_parameters(adapters: dict[str, Adapter], config: Any, places: dict[str, Place]) -> None:
    """LoRA on parameters that are no module's weight, such as all experts of a block in one tensor."""
    found: dict[str, list[str]] = {}
    for wanted in config.adapted_parameters:
        names = [(path, name) for path, place in places.items() for name in place.module._parameters]
        matches = [(path, name) for path, name in names if f".{path}.{name}".endswith(f".{wanted}")]
        if not matches:
            length = wanted.count(".") + 1
            remedy = did_you_mean(wanted, [".".join(f"{path}.{name}".split(".")[-length:]) for path, name in names])
            raise AdapterError("No such parameter", f"target_parameters: none of the model matches {wanted!r}.", remedy)
        for path, name in matches:
            found.setdefault(path, []).append(name)
    for path, names in found.items():
        if path in adapters:
            message = f"{path} is named in target_modules and in target_parameters."
            raise AdapterError("A module is named twice", message, "Name it in one of them.")
        base = places[path].module
        if isinstance(base, LINEARS) and names == ["weight"]:
            adapters[path] = Lora.create(base, config, path, None)
        else:
            adapters[path] = LoraExperts.create(base, config, path, names)


def _add_biases(adapters: dict[str, Adapter], config: LayerConfig, places: dict[str, Place]) -> None:
    if config.trained_biases == "none":
        return
    saved = saved_modules(config, places)
    paths = list(places) if config.trained_biases == "all" else list(adapters)
    for path in paths:
        base = places[path].module
        if base._parameters.get("bias") is None or any(
            path == other or path.startswith(f"{other}.") for other in saved
        ):
            continue
        _check_base(Bias, config, path, base)
        bias = Bias.create(base, config, path, path in adapters)
        adapters[path] = Several([adapters[path], bias]) if path in adapters else bias


def _add_tokens(model: nn.Module, adapters: dict[str, Adapter], config: LayerConfig, places: dict[str, Place]) -> None:
    for path, tokens in token_adapters(model, config, adapters, places).items():
        there = adapters.get(path)
        adapters[path] = tokens if there is None or isinstance(there, TrainableTokens) else Several([there, tokens])


def _add_saved_modules(
    adapters: dict[str, Adapter], config: LayerConfig | PromptLearningConfig, places: dict[str, Place]
) -> None:
    kind = SavedBesidePrompt if isinstance(config, PromptLearningConfig) else SavedModule
    saved = saved_modules(config, places)
    for path in saved:
        if path in adapters or any(path.startswith(f"{other}.") for other in saved):
            message = f"{path} is to be saved whole, and is adapted or inside another module that is saved whole."
            raise AdapterError("A module is named twice", message, "Name it in modules_to_save or in target_modules.")
        adapters[path] = kind(copy.deepcopy(places[path].module))


def _prompt(model: Any, config: PromptLearningConfig, places: dict[str, Place]) -> dict[str, Adapter]:
    """A prompt hangs at the input embedding, which stays as it is; `prompted` puts it before the tokens."""
    embedding = model.get_input_embeddings()
    base = embedding.base_layer if isinstance(embedding, AdapterLayer) else embedding
    path = next(path for path, place in places.items() if place.module is base)
    return {path: adapter_class(config).create(base, config, path, None)}


def attach(model: nn.Module, state: ActiveAdapters, name: str, adapters: dict[str, Adapter]) -> None:
    """Put the adapters into the model's layers under one name."""
    places = walk(model)
    for path, adapter in adapters.items():
        place = places[path]
        layer = place.parent._modules[place.attribute]
        if not isinstance(layer, AdapterLayer):
            layer = AdapterLayer(place.module, state, path)
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
