"""Which modules of a model a config means. The matching rules are PEFT's, exactly; the errors are ours.

    find_targets(model, LoraConfig(target_modules=["q_proj", "v_proj"]))   # ["model.layers.0.self_attn.q_proj", ...]

Works on the meta device too, so that a config can be checked before any weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from nbtune._transformers import Conv1D, PreTrainedModel
from nbtune.errors import AdapterError
from nbtune.peft.config import LayerConfig, PeftConfig, PromptLearningConfig, TaskType, did_you_mean
from nbtune.peft.layer import AdapterLayer

_LINEAR = (nn.Linear, Conv1D)
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
    config = resolve(model, config, places)
    for name, names in (("target_modules", config.target_modules), ("modules_to_save", config.modules_to_save)):
        for entry in names if isinstance(names, list) else []:
            if entry not in _task_heads(config) and not any(_ends_with(path, [entry]) for path in places):
                raise _no_match(name, entry, places)
    paths = matching(config, places)
    for name, patterns in config.patterns.items():
        for pattern in patterns:
            if not any(_of_end(pattern, path) for path in paths):
                raise _no_match(name, pattern, paths)
    return paths


def resolve(model: nn.Module, config: LayerConfig, places: dict[str, Place] | None = None) -> LayerConfig:
    """The config with its targets in PEFT's words: None and all-linear become names, a task's head is added.

    A resolved config means the same modules to `peft`, which has a table where nbtune looks at the structure.
    """
    places = places if places is not None else walk(model)
    targets = config.target_modules
    if targets is None:
        targets = _shortest_names(_in_blocks(places, config), places)
    elif isinstance(targets, str) and targets.lower() == "all-linear":
        targets = _shortest_names(_all_linear(model, places, config), places)
    return config.replace(target_modules=targets, modules_to_save=with_task_heads(config))


def with_task_heads(config: LayerConfig | PromptLearningConfig) -> list[str] | None:
    """`modules_to_save`, and the names that the head of the config's task has in the models."""
    named = list(dict.fromkeys(config.modules_to_save or []))
    return [*named, *(head for head in _task_heads(config) if head not in named)] or None


def matching(config: LayerConfig, places: Iterable[str]) -> list[str]:
    """Those of the module paths that a resolved config adapts. Raises AdapterError where there are none."""
    places = list(places)
    found = [path for path in places if _is_target(path, config)]
    if not found:
        everywhere = config.replace(
            exclude_modules=None, layers_to_transform=None, layers_pattern=None, modules_to_save=None
        )
        if any(_is_target(path, everywhere) for path in places):
            message = "Each module that target_modules names is left out by another setting."
            remedy = "Look at exclude_modules, layers_to_transform, layers_pattern and modules_to_save."
            raise AdapterError("No module is left", message, remedy)
        names = config.target_modules
        raise _no_match("target_modules", names if isinstance(names, str) else ", ".join(names or []), places)
    return found


def saved_modules(config: LayerConfig | PromptLearningConfig, places: Iterable[str]) -> list[str]:
    """The paths of the modules that are trained and saved whole; PEFT compares the ends of the paths as text."""
    return [path for path in places if path.endswith(tuple(config.modules_to_save or ()))]


def of_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module path, or the default."""
    return next((value for pattern, value in patterns.items() if _of_end(pattern, path)), default)


def _of_end(pattern: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _is_target(path: str, config: LayerConfig) -> bool:
    exclude, targets = config.exclude_modules, config.target_modules
    if isinstance(exclude, str) and exclude and re.fullmatch(exclude, path):
        return False
    if isinstance(exclude, list) and _ends_with(path, exclude):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in config.modules_to_save or ()):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    if path in (targets or ()):  # a full path is meant whatever its block
        return True
    return _ends_with(path, targets or ()) and _in_layers(path, config)


def _ends_with(path: str, names: Sequence[str]) -> bool:
    """Whether a path is one of the names, or ends in one of them at a dot."""
    return path in names or path.endswith(tuple(f".{name}" for name in names))


def _in_layers(path: str, config: LayerConfig) -> bool:
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    # The first number counts: a later one is that of an expert in its block.
    searches = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in patterns or ()]
    match = next(
        (match for search in searches or [r".*?\.[^.]*\.(?P<index>\d+)\."] if (match := re.match(search, path))), None
    )
    return match is not None and int(match["index"]) in ([layers] if isinstance(layers, int) else layers)


def _in_blocks(places: dict[str, Place], config: LayerConfig) -> list[str]:
    """The linear layers inside the outermost lists of modules: the projections of a model's repeated blocks."""
    lists = tuple(f"{path}." for path, place in places.items() if isinstance(place.module, nn.ModuleList))
    found = [path for path, place in places.items() if isinstance(place.module, _LINEAR) and path.startswith(lists)]
    if not found:
        remedy = f"Name target_modules. Linear layers here: {_some(_linear_names(places))}."
        raise AdapterError("No repeated blocks", f"{type(config).__name__} names no target_modules.", remedy)
    return found


def _all_linear(model: nn.Module, places: dict[str, Place], config: LayerConfig) -> list[str]:
    """Every linear layer but the output head."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if isinstance(head, AdapterLayer):
        head = head.base_layer
    if isinstance(model, PreTrainedModel) and head is None and config.task_type == TaskType.SEQ_CLS:
        head = next((places[name].module for name in ("score", "classifier") if name in places), None)
    return [path for path, place in places.items() if isinstance(place.module, _LINEAR) and place.module is not head]


def _task_heads(config: PeftConfig) -> tuple[str, ...]:
    return _HEADS.get(TaskType(config.task_type), ()) if config.task_type else ()


def _shortest_names(paths: list[str], places: dict[str, Place]) -> list[str]:
    """The fewest endings of paths that mean these modules and no others, so that a config stays readable."""
    wanted = set(paths)
    taken = {ending for path in places if path not in wanted for ending in _endings(path)}
    return sorted({next((ending for ending in _endings(path) if ending not in taken), path) for path in paths})


def _endings(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def _linear_names(places: dict[str, Place]) -> list[str]:
    return list(
        dict.fromkeys(path.rpartition(".")[2] for path, place in places.items() if isinstance(place.module, _LINEAR))
    )


def _no_match(setting: str, entry: str, places: Iterable[str]) -> AdapterError:
    """The error for a name that matches no module, with the nearest names of the same length in dots."""
    length = entry.count(".") + 1
    names = dict.fromkeys(".".join(path.split(".")[-length:]) for path in places)
    last = dict.fromkeys(path.rpartition(".")[2] for path in places)
    remedy = did_you_mean(entry, list(names)) or f"There are: {_some(name for name in last if not name.isdigit())}."
    return AdapterError("No such module", f"{setting}: no module of the model matches {entry!r}.", remedy)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") if names else "none"
