"""Adapter configs: PEFT's names, defaults and JSON, as dataclasses that carry the metadata of a form.

Imports no torch, so that a spec can be read, checked and shown before anything heavy is loaded.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from nbtune.errors import AdapterError


def setting(default: Any = dataclasses.MISSING, *, help: str, factory: Any = dataclasses.MISSING, **metadata: Any) -> Any:
    """A dataclass field with its help and limits (label, unit, choices, ge, gt, le, lt, advanced, sweepable)."""
    return dataclasses.field(default=default, default_factory=factory, metadata={"help": help, **metadata})


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What every adapter has."""

    peft_type: ClassVar[str] = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PeftConfig:
        """The config that `peft_type` names."""
        values = dict(values)
        if values.pop("peft_type", "LORA") != "LORA":
            raise AdapterError("Unknown method")
        return LoraConfig(**values)

    def to_dict(self) -> dict[str, Any]:
        return {"peft_type": self.peft_type, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class LoraConfig(PeftConfig):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685)."""

    peft_type: ClassVar[str] = "LORA"
    r: int = setting(8, help="Rank of the update.", label="Rank r", ge=1, sweepable=True)
    lora_alpha: float = setting(16, help="Scale of the update is lora_alpha / r.", label="Alpha", gt=0, sweepable=True)
    lora_dropout: float = setting(0.0, help="Dropout on the adapter's input.", ge=0, lt=1, advanced=True)
    target_modules: list[str] | str | None = setting(None, help="Names or a regex of the modules to adapt.")
