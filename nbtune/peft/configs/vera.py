"""VeRA's settings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nbtune.peft.config import BiasedConfig, setting


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class VeraConfig(BiasedConfig):
    """Two trained vectors per layer between random matrices (Kopiczko et al. 2023, arXiv:2310.11454)."""

    peft_type: ClassVar[str] = "VERA"
    only: ClassVar[str] = "vera_only"
    absent: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    r: int = setting(
        256, help="Rank of the random matrices; it costs few parameters.", label="Rank r", ge=1, sweepable=True
    )
    vera_dropout: float = setting(
        0.0, help="Share of the adapter's inputs dropped in training.", label="Dropout", ge=0, lt=1, sweepable=True
    )
    d_initial: float = setting(
        0.1, help="First value of the inner vector; 0.1 or less works well.", sweepable=True, advanced=True
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
