"""Another LoRA's weights in the place of one that is loaded, without touching the model's structure.

`hotswap_adapter` is PEFT's: tensors are overwritten in place, so that a compiled model needs no new compilation as
long as the scaling is the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nbtune.errors import AdapterError
from nbtune.peft import checkpoint, inject
from nbtune.peft.config import PeftConfig, adapter_folder
from nbtune.peft.configs.lora import LoraConfig
from nbtune.peft.methods.lora import Lora
from nbtune.peft.model import PeftModel
from nbtune.peft.targets import resolve


def hotswap_adapter(
    model: PeftModel,
    model_name_or_path: str | Path,
    adapter_name: str,
    torch_device: str | torch.device | None = None,  # noqa: ARG001
    *,
    revision: str | None = None,
) -> None:
    """Overwrite a loaded LoRA with the one in a folder or hub repository; it keeps its name.

    The new one may have lower ranks and adapt fewer layers: what it lacks becomes zero. Raises AdapterError, and
    changes nothing, where it has more, or where either is no plain LoRA. `torch_device` is PEFT's; tensors go to the
    device of those that they replace.
    """
    model._check_known([adapter_name])
    model._refuse_merged([adapter_name])
    folder = adapter_folder(model_name_or_path, revision)
    config, old = PeftConfig.from_pretrained(folder), model.peft_config[adapter_name]
    if not isinstance(config, LoraConfig) or not isinstance(old, LoraConfig):
        message = f"{old.peft_type} cannot become {config.peft_type} in place."
        raise AdapterError("Only LORA can be swapped", message, "Use load_adapter and delete_adapter.")
    base = model.get_base_model()
    config = resolve(base, config.replace(inference_mode=old.inference_mode))
    new: dict[str, Any] = inject.build(base, config)
    places: dict[str, Any] = model._adapters(adapter_name)
    checkpoint.fill(base, new, checkpoint.read(folder))
    _check(new, places)
    for path, adapter in places.items():
        _overwrite(adapter, new.get(path))
    model.peft_config[adapter_name] = config


def _check(new: dict[str, Any], places: dict[str, Any]) -> None:
    extra = sorted(new.keys() - places.keys())
    if extra:
        message = f"The new adapter adapts {len(extra)} layers that the loaded one does not, such as {extra[0]}."
        raise AdapterError("Does not fit in place", message, "Load the adapter with more layers first.")
    for path, place in places.items():
        pair = [part for part in (place, new.get(path)) if part is not None]
        alike = len({tuple(name for name, _ in part.named_parameters()) for part in pair}) == 1
        if not alike or not all(isinstance(part, Lora) and part.start_A is None for part in pair):
            message = f"{path}: one of the two has more than A and B, or is no LoRA."
            raise AdapterError("Does not fit in place", message, "Use load_adapter and delete_adapter.")
        ranks = [len(part.lora_A) for part in pair]
        if ranks[-1] > ranks[0]:
            message = f"{path}: the new adapter's rank is {ranks[-1]}, the loaded one's {ranks[0]}."
            raise AdapterError("Does not fit in place", message, "Load the adapter with the highest rank first.")


@torch.no_grad()
def _overwrite(place: Lora, new: Lora | None) -> None:
    for name, parameter in place.named_parameters():
        parameter.zero_()
        if new is not None:
            value = new.get_parameter(name)
            parameter[tuple(slice(size) for size in value.shape)] = value.to(parameter.device, parameter.dtype)
    if new is not None:
        place.scaling, place.dropout = new.scaling, new.dropout
