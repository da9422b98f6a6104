"""One file per method; each reads like the equation in its paper."""

from __future__ import annotations

import importlib

from nbtune.peft.config import PeftConfig
from nbtune.peft.layer import Adapter


def adapter_class(config: PeftConfig) -> type[Adapter]:
    """The class of the adapters that a config describes."""
    module = importlib.import_module(f"{__name__}.{config.peft_type.lower()}")
    return vars(module)[type(config).__name__.removesuffix("Config")]
