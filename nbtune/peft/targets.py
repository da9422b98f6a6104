"""Which modules of a model a config means. The matching rules are PEFT's, exactly; the errors are ours.

    find_targets(model, LoraConfig(target_modules=["q_proj", "v_proj"]))   # ["model.layers.0.self_attn.q_proj", ...]

Without target_modules they are those of PEFT's tables (`defaults.py`); for a model that these miss, or where they match
nothing, what the method adapts in the blocks of the text model (`structure.py`).

Works on the meta device too, so that a config can be checked before any weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn

from nbtune._transformers import PreTrainedModel
from nbtune.errors import AdapterError
from nbtune.modules import structure
from nbtune.modules.base import LINEARS
from nbtune.modules.defaults import default_feedforward, default_targets
from nbtune.modules.paths import ends_with, in_layers, of_end, shortest_names
from nbtune.peft.config import LayerConfig, PeftConfig, PromptLearningConfig, TaskType, did_you_mean
from nbtune.peft.configs.lora import LoraConfig
from nbtune.peft.configs.vectors import IA3Config
from nbtune.peft.layer import AdapterLayer

# What PEFT trains in full for a task, where the model has it.
_HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


class Place(NamedTuple):
    """A module of the base model, and where it hangs."""

    module: nn.Module  # the base layer, where `parent.attribute` is an AdapterLayer
    parent: nn.Module
    attribute: str


def walk(model: nn.Module) -> dict[str, Place]:
    """Every module below `model` by its path in the unadapted model, each once. Adapters have no paths."""
    return dict(_walk(model, "", set()))


def _walk(parent: nn.Module, prefix: str, seen: set[nn.Module]) -> Iterator[tuple[str, Place]]:
    for attribute, child in parent.named_children():
        module = child.base_layer if isinstance(child, AdapterLayer) else child
        if module in seen:
            continue
        seen.add(module)
        path = f"{prefix}{attribute}"
        yield path, Place(module, parent, attribute)
        yield from _walk(module, f"{path}.", seen)


def find_targets(model: nn.Module, config: LayerConfig) -> list[str]:
    """The paths of the modules that a config adapts, in the model's order.

    Raises AdapterError where there are none, and where a name in a list is no module's, with the nearest names.
    """
    places = walk(model)
    for name, names in (("target_modules", config.target_modules), ("modules_to_save", config.modules_to_save)):
        for entry in names if isinstance(names, list) else []:
            if entry not in _task_heads(config) and not any(ends_with(path, [entry]) for path in places):
                raise _no_match(name, entry, places)
    config = resolve(model, config, places)
    paths = matching(config, places)
    for name, patterns in config.patterns.items():
        for pattern in patterns:
            if not any(of_end(pattern, path) for path in paths):
                raise _no_match(name, pattern, paths)
    return paths


def resolve(model: nn.Module, config: LayerConfig, places: dict[str, Place] | None = None) -> LayerConfig:
    """The config with its targets in PEFT's words: None and all-linear become names, a task's head is added.

    A resolved config means the same modules to `peft`, also for a model that is not in its tables.
    """
    places = places if places is not None else walk(model)
    targets = config.target_modules
    if targets is None:
        targets = _default_names(model, config, places)
    elif isinstance(targets, str) and targets.lower() == "all-linear":
        targets = shortest_names(_all_linear(model, places, config), places)
    resolved = config.replace(target_modules=targets, modules_to_save=with_task_heads(config))
    unwritten = {name: None for name in config.absent if vars(config)[name] is not None}
    if unwritten:  # PEFT would pass over these settings of this method; the names say the same
        resolved = resolved.replace(target_modules=shortest_names(matching(resolved, places), places), **unwritten)
    if isinstance(resolved, IA3Config) and resolved.feedforward_modules is None:
        return resolved.replace(feedforward_modules=_feedforward_names(model, resolved, places))
    return resolved


def with_task_heads(config: LayerConfig | PromptLearningConfig) -> list[str] | None:
    """`modules_to_save`, and the names that the head of the config's task has in the models."""
    named = list(dict.fromkeys(config.modules_to_save or []))
    return [*named, *(head for head in _task_heads(config) if head not in named)] or None


def matching(config: LayerConfig, places: Iterable[str]) -> list[str]:
    """Those of the module paths that a resolved config adapts. Raises AdapterError where there are none."""
    places = list(places)
    found = [path for path in places if _is_target(path, config)]
    if not found and not _names_parameters(config):
        limits = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        everywhere = config.replace(**dict.fromkeys(limits))
        if any(_is_target(path, everywhere) for path in places):
            message = "Each module that target_modules names is left out by another setting."
            raise AdapterError("No module is left", message, f"Look at {', '.join(limits)}.")
        names = config.target_modules
        raise _no_match("target_modules", names if isinstance(names, str) else ", ".join(names or []), places)
    return found


def saved_modules(config: LayerConfig | PromptLearningConfig, places: Iterable[str]) -> list[str]:
    """The paths of the modules that are trained and saved whole; PEFT compares the ends of the paths as text."""
    return [path for path in places if path.endswith(tuple(config.modules_to_save or ()))]


def _is_target(path: str, config: LayerConfig) -> bool:
    exclude, targets = config.exclude_modules, config.target_modules
    if isinstance(exclude, str) and exclude and re.fullmatch(exclude, path):
        return False
    if isinstance(exclude, list) and ends_with(path, exclude):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in config.modules_to_save or ()):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    if path in (targets or ()):  # a full path is meant whatever its block
        return True
    return ends_with(path, targets or ()) and in_layers(path, config.layers_to_transform, config.layers_pattern)


def _default_names(model: nn.Module, config: LayerConfig, places: dict[str, Place]) -> list[str] | None:
    """PEFT's default targets as far as the model has them, or else by structure; None where parameters are named."""
    known = default_targets(config.peft_type, _model_type(model))
    if isinstance(known, str):
        known = shortest_names([path for path in places if re.fullmatch(known, path)], places)
    names = [name for name in known or [] if any(ends_with(path, [name]) for path in places)]
    if names or _names_parameters(config):
        return names or None
    modules = {path: place.module for path, place in places.items()}
    match config.peft_type:
        case "IA3":
            names = shortest_names(structure.keys_and_values(model, modules), places)
            names += [
                name for name in shortest_names(structure.last_of_mlp(model, modules), places) if name not in names
            ]
        case "LN_TUNING":
            names = shortest_names(structure.norms(model, modules), places)
        case "BEFT":
            names = shortest_names(structure.values(model, modules), places)
        case "TRAINABLE_TOKENS" if isinstance(model, PreTrainedModel):
            names = shortest_names([_path_of(model.get_input_embeddings(), places)], places)
        case _:
            names = shortest_names(structure.projections(model, modules), places)
    if not names:
        message = f"{type(config).__name__} names no target_modules, and none are found in repeated blocks."
        linear = [path.rpartition(".")[2] for path, place in places.items() if isinstance(place.module, LINEARS)]
        raise AdapterError("No targets", message, f"Name target_modules. Linear layers here: {_some(linear)}.")
    return names


def _feedforward_names(model: nn.Module, config: LayerConfig, places: dict[str, Place]) -> list[str] | str:
    """IA3's feedforward modules: those of its targets that mean no other module, or else a regular expression."""
    names = default_feedforward(_model_type(model))
    if names is None:
        modules = {path: place.module for path, place in places.items()}
        names = shortest_names(structure.last_of_mlp(model, modules), places)
    paths = matching(config, places)
    of_feedforward = [path for path in paths if path.endswith(tuple(names))]  # PEFT compares the ends as text
    if not of_feedforward:
        return []
    if isinstance(config.target_modules, list):
        others = [path for path in paths if path not in of_feedforward]
        targets = [name for name in config.target_modules if not any(ends_with(path, [name]) for path in others)]
        if all(ends_with(path, targets) for path in of_feedforward):
            return [name for name in targets if any(ends_with(path, [name]) for path in of_feedforward)]
    return f".*({'|'.join(map(re.escape, names))})"


def _names_parameters(config: LayerConfig) -> bool:
    """Whether a LoRA adapts parameters, such as fused experts, so that it need not adapt any module."""
    return isinstance(config, LoraConfig) and bool(config.target_parameters)


def _model_type(model: nn.Module) -> str:
    return model.config.model_type if isinstance(model, PreTrainedModel) else ""


def _path_of(module: nn.Module, places: dict[str, Place]) -> str:
    base = module.base_layer if isinstance(module, AdapterLayer) else module
    return next(path for path, place in places.items() if place.module is base)


def _all_linear(model: nn.Module, places: dict[str, Place], config: LayerConfig) -> list[str]:
    """Every linear layer but the output head."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if isinstance(head, AdapterLayer):
        head = head.base_layer
    if isinstance(model, PreTrainedModel) and head is None and config.task_type == TaskType.SEQ_CLS:
        head = next((places[name].module for name in ("score", "classifier") if name in places), None)
    return [path for path, place in places.items() if isinstance(place.module, LINEARS) and place.module is not head]


def _task_heads(config: PeftConfig) -> tuple[str, ...]:
    return _HEADS.get(TaskType(config.task_type), ()) if config.task_type else ()


def _no_match(setting: str, entry: str, places: Iterable[str]) -> AdapterError:
    """The error for a name that matches no module, with the nearest names of the same length in dots."""
    length = entry.count(".") + 1
    names = dict.fromkeys(".".join(path.split(".")[-length:]) for path in places)
    last = dict.fromkeys(path.rpartition(".")[2] for path in places)
    remedy = did_you_mean(entry, list(names)) or f"There are: {_some(name for name in last if not name.isdigit())}."
    return AdapterError("No such module", f"{setting}: no module of the model matches {entry!r}.", remedy)


def _some(names: Iterable[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") if names else "none"
