"""One file per method; each reads like the equation in its paper."""

from __future__ import annotations

import importlib

from nbtune.peft.config import METHODS, PeftConfig, PeftType
from nbtune.peft.layer import Adapter


def adapter_class(config: PeftConfig) -> type[Adapter]:
    """The class of the adapters that a config describes."""
    method = METHODS[PeftType(config.peft_type)]
    return vars(importlib.import_module(f"{__name__}.{method.module}"))[method.adapter]
