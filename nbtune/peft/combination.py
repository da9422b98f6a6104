"""Adapters of one model, combined into a new one; the mathematics is in kernels/low_rank.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from nbtune.errors import AdapterError
from nbtune.kernels.low_rank import plan_combination
from nbtune.modules.base import LINEARS, Conv1D
from nbtune.peft.config import LayerConfig, PeftConfig
from nbtune.peft.configs.lora import LoraConfig
from nbtune.peft.layer import Adapter
from nbtune.peft.methods import adapter_class
from nbtune.peft.targets import shortest_names, walk


def combined(
    model: nn.Module,
    parts: Mapping[str, tuple[PeftConfig, Mapping[str, Adapter]]],
    weights: Sequence[float],
    combination_type: str,
    **settings: Any,
) -> tuple[PeftConfig, dict[str, Adapter]]:
    """The config and the adapters, by module path, that combine the named ones. A layer combines those that it has.

    Raises AdapterError where they are of several methods, of one that has no combinations, or more than the method's
    own adapters (saved modules, biases, tokens).
    """
    configs = [config for config, _ in parts.values()]
    kind = _kind(configs)
    foreign = [path for _, adapters in parts.values() for path, part in adapters.items() if not isinstance(part, kind)]
    if foreign:
        message = f"{foreign[0]} has a trained module, bias or tokens, which have no combination."
        raise AdapterError("Cannot combine these adapters", message, "Combine adapters without them.")
    places = walk(model)
    paths = [path for path in places if any(path in adapters for _, adapters in parts.values())]
    config, how = configs[0], settings
    if isinstance(config, LoraConfig):
        ranks = [max(len(part.lora_A) for part in adapters.values()) for _, adapters in parts.values()]  # type: ignore
        planned = {name: value for name, value in settings.items() if name != "svd_driver"}
        combination_type, rank = plan_combination(ranks, weights, combination_type, **planned)
        how = {name: value for name, value in settings.items() if name != "svd_rank"} | {"rank": rank}
        plain = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True}
        config = config.replace(r=rank, lora_alpha=rank, **plain)
    assert isinstance(config, LayerConfig)
    new: dict[str, Adapter] = {}
    for path in paths:
        here = [
            (adapters[path], weight)
            for (_, adapters), weight in zip(parts.values(), weights, strict=True)
            if path in adapters
        ]
        transposed = isinstance(places[path].module, Conv1D) or not isinstance(places[path].module, LINEARS)
        extra = {"fan_in_fan_out": transposed} if isinstance(config, LoraConfig) else {}
        new[path] = kind.combined([part for part, _ in here], [w for _, w in here], combination_type, **how, **extra)
        new[path].requires_grad_(False)
    names = {"target_modules": shortest_names(paths, places), "exclude_modules": None}
    return config.replace(**names, layers_to_transform=None, layers_pattern=None, inference_mode=True), new


def _kind(configs: Sequence[PeftConfig]) -> Any:
    methods = {config.peft_type for config in configs}
    if len(methods) != 1:
        message = f"The adapters are of {len(methods)} methods: {', '.join(sorted(methods)) or 'none'}."
        raise AdapterError("Cannot combine these adapters", message, "Name adapters of one method.")
    kind = adapter_class(configs[0])
    if not kind.weighted:
        message = f"{configs[0].peft_type} has no weighted combinations; LORA and IA3 have."
        raise AdapterError("Cannot combine these adapters", message, "Activate several at once: set_adapter([...]).")
    return kind
