"""RandLoRA's settings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nbtune.peft.config import BiasedConfig, setting


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class RandLoraConfig(BiasedConfig):
    """Full-rank updates as weighted sums of random low-rank matrices (Albert et al. 2025, arXiv:2502.00987)."""

    peft_type: ClassVar[str] = "RANDLORA"
    only: ClassVar[str] = "randlora_only"
    absent: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    r: int = setting(
        32,
        help="Rank of each random matrix. A lower rank needs more of them, so more is trained.",
        label="Rank r",
        ge=1,
        sweepable=True,
    )
    randlora_alpha: float = setting(
        640,
        help="Strength of the update, scaled by randlora_alpha / r. Usually 20 r; less where training is unstable.",
        label="Alpha",
        gt=0,
        sweepable=True,
    )
    randlora_dropout: float = setting(
        0.0, help="Share of the adapter's inputs dropped in training.", label="Dropout", ge=0, lt=1, sweepable=True
    )
    sparse: bool = setting(False, help="Random matrices of -1, 0 and 1, two thirds of them 0.", advanced=True)
    very_sparse: bool = setting(
        False,
        help="The same with far more zeros: all but 1 in sqrt(d), d the smaller of the largest sizes.",
        advanced=True,
    )
    projection_prng_key: int = setting(0, help="Seed of the random matrices.", label="Seed", ge=0, advanced=True)
    save_projection: bool = setting(
        True, help="Store the random matrices in the file instead of making them again from the seed.", advanced=True
    )
    init_weights: bool = setting(
        True, help="First weights: True (the update starts at zero) or False (random: for tests).", advanced=True
    )
    fan_in_fan_out: bool = setting(
        False, help="Written by PEFT for layers that store their weight transposed; nbtune sees it.", advanced=True
    )
