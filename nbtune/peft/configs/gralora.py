"""GraLoRA's settings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nbtune.peft.config import BiasedConfig, invalid, setting


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class GraloraConfig(BiasedConfig):
    """A low-rank adapter for each block of the weight (Jung et al. 2025, arXiv:2505.20355)."""

    peft_type: ClassVar[str] = "GRALORA"
    only: ClassVar[str] = "gralora_only"
    absent: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    r: int = setting(32, help="Rank: as many parameters as LoRA of this rank.", label="Rank r", ge=1, sweepable=True)
    hybrid_r: int = setting(
        0, help="Rank of a plain LoRA beside it; 0 is none.", label="Hybrid rank", ge=0, sweepable=True
    )
    alpha: float = setting(
        64, help="Strength of the update: it is scaled by alpha / (r + hybrid_r).", label="Alpha", gt=0, sweepable=True
    )
    gralora_dropout: float = setting(
        0.0, help="Share of the adapter's inputs dropped in training.", label="Dropout", ge=0, lt=1, sweepable=True
    )
    gralora_k: int = setting(
        2,
        help="Blocks along each side of the weight, a divisor of r: 2 up to rank 32, 4 above.",
        label="Blocks k",
        ge=1,
    )
    init_weights: bool = setting(
        True,
        help="Start without a change; if not, from random values, for tests.",
        label="Start from zeros",
        advanced=True,
    )
    fan_in_fan_out: bool = False  # written by PEFT; a layer shows by its kind how it stores its weight

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r % self.gralora_k:
            raise invalid("r", self.r, f"must be a multiple of gralora_k, {self.gralora_k}")
