"""One file per method; each reads like the equation in its paper."""

from __future__ import annotations

from nbtune.peft.config import PeftConfig
from nbtune.peft.layer import Adapter


def adapter_class(config: PeftConfig) -> type[Adapter]:
    """The class of the adapters that a config describes."""
    from nbtune.peft.methods.lora import Lora

    return {"LORA": Lora}[config.peft_type]
