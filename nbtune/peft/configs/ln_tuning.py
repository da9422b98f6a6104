"""LN tuning's settings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nbtune.peft.config import LayerConfig


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class LNTuningConfig(LayerConfig):
    """Trained norms (Zhao et al. 2023, arXiv:2312.11420). Names and defaults are those of peft 0.21."""

    peft_type: ClassVar[str] = "LN_TUNING"
    absent: ClassVar[tuple[str, ...]] = ("layers_to_transform", "layers_pattern")
