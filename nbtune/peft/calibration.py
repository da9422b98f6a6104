"""First weights of a LoRA that need more than its base layer: inputs (EVA) or the unquantised weights (LoftQ)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nbtune.errors import AdapterError
from nbtune.modules import quantised
from nbtune.modules.eva import eva
from nbtune.modules.loftq import loftq_of_base
from nbtune.modules.pretrained import open_weights
from nbtune.peft.configs.lora import LoraConfig
from nbtune.peft.inject import adapter_layers, attach
from nbtune.peft.methods.lora import Lora
from nbtune.peft.model import PeftModel


def initialize_lora_eva_weights(
    model: PeftModel, dataloader: Iterable[Mapping[str, Tensor]], adapter_name: str = "default"
) -> None:
    """Give a new LoRA with init `eva` the main directions of its layers' inputs as A, and ranks by their weight.

    `dataloader` yields batches for the model's forward; some hundred rows are enough. The rank budget is r for each
    layer on average; a layer may end up with none. Paischer et al. 2024, arXiv:2410.07170.
    """
    config, lora = _plain(model, adapter_name, "eva")
    options = {"rho": 2.0, "tau": 0.99, "use_label_mask": True, "label_mask_value": -100, "whiten": False}
    given = dict(config.eva_config or {})
    adjust = given.pop("adjust_scaling_factors", True)
    if given.keys() - options:
        message = f"eva_config has no setting {', '.join(sorted(given.keys() - options))}."
        raise AdapterError("Invalid eva_config", message, f"It has {', '.join(options)}, adjust_scaling_factors.")
    base = model.get_base_model()
    layers = {path: layer.base_layer for path, layer in adapter_layers(base) if path in lora}
    ranks = {path: len(adapter.lora_A) for path, adapter in lora.items()}
    with model.disable_adapter():
        found = eva(base, layers, dataloader, ranks, **{**options, **given})
    patterns: dict[str, dict[str, Any]] = {"rank_pattern": {}, "alpha_pattern": {}}
    new = {}
    for path, A in found.items():
        if not len(A):
            continue
        old = lora[path]
        alpha = config.lora_alpha * len(A) / ranks[path] if adjust else config.lora_alpha
        patterns["rank_pattern"][path], patterns["alpha_pattern"][path] = len(A), alpha
        scaling = alpha / (len(A) ** 0.5 if config.use_rslora else len(A))
        new[path] = Lora(A, old.lora_B.new_zeros(len(old.lora_B), len(A)), scaling, old.dropout)
    config = config.replace(target_modules=sorted(new), **patterns)
    model._remove(adapter_name)
    attach(base, model._state, adapter_name, new)
    model.peft_config[adapter_name] = config
    model.set_adapter(adapter_name)


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: PeftModel, model_path: str | Path | None = None, adapter_name: str = "default"
) -> None:
    """Make a new LoRA on a 4-bit base the best low-rank approximation of what quantising took away.

    `model_path` is the folder of the unquantised model's safetensors (by default the base's own). One step of LoftQ, Li
    et al. 2023, arXiv:2310.08659. Raises AdapterError, and changes nothing, where a weight is not there.
    """
    _, lora = _plain(peft_model, adapter_name, None)
    base: Any = peft_model.get_base_model()
    folder = Path(model_path if model_path is not None else base.name_or_path)
    layers = {path: layer.base_layer for path, layer in adapter_layers(base) if path in lora}
    with contextlib.ExitStack() as files:
        weights = open_weights(folder, files)
        missing = [path for path in layers if f"{path}.weight" not in weights]
        if missing or not all(quantised.is_quantised(layer) for layer in layers.values()):
            message = f"{folder} has no weight of {missing[0]}." if missing else "A layer of the base is not quantised."
            raise AdapterError("LoftQ needs the original weights", message, "Give the folder of the unquantised model.")
        for path, layer in layers.items():
            weight = weights[f"{path}.weight"].get_tensor(f"{path}.weight").to(layer.weight.device)
            A, B = loftq_of_base(weight, layer, len(lora[path].lora_A))
            lora[path].lora_A.copy_(A)
            lora[path].lora_B.copy_(B / lora[path].scaling)


def _plain(model: PeftModel, name: str, init: str | None) -> tuple[LoraConfig, dict[str, Lora]]:
    """The config and the layers of an adapter that is LoRA and nothing else."""
    model._check_known([name])
    model._refuse_merged([name])
    config, adapters = model.peft_config[name], model._adapters(name)
    lora: dict[str, Any] = dict(adapters)
    fits = isinstance(config, LoraConfig) and init in (None, config.init_lora_weights)
    if not fits or any(type(part) is not Lora for part in lora.values()):
        wanted = f" with init_lora_weights={init!r}" if init else ""
        message = f"{name} is not a LoRA{wanted} on linear layers alone."
        raise AdapterError("Not for this adapter", message, "Make it with get_peft_model and such a config.")
    assert isinstance(config, LoraConfig)
    return config, lora
