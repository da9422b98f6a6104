"""LoHa's settings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nbtune.peft.configs.lycoris import LycorisConfig


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class LoHaConfig(LycorisConfig):
    """Hadamard products of two low-rank updates (Hyeon-Woo et al. 2021, arXiv:2108.06098), of rank up to r^2."""

    peft_type: ClassVar[str] = "LOHA"
