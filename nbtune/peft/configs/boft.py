"""BOFT's settings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nbtune.peft.config import BiasedConfig, invalid, setting


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class BOFTConfig(BiasedConfig):
    """Orthogonal butterflies (Liu et al. 2023, arXiv:2311.06243). Names and defaults are those of peft 0.21."""

    peft_type: ClassVar[str] = "BOFT"
    only: ClassVar[str] = "boft_only"

    boft_block_size: int = setting(
        4, help="Size of the rotated blocks; 0: set by boft_block_num.", label="Block size", ge=0, sweepable=True
    )
    boft_block_num: int = setting(
        0, help="Number of blocks per layer, instead of boft_block_size.", ge=0, sweepable=True
    )
    boft_n_butterfly_factor: int = setting(
        1,
        help="Rotations in a row, each over pairs of inputs twice as far apart; 1 is OFT with exact rotations.",
        label="Butterfly factors",
        ge=1,
        sweepable=True,
    )
    boft_dropout: float = setting(
        0.0, help="Share of one factor's blocks left unrotated in a training step.", label="Dropout", ge=0, lt=1
    )
    init_weights: bool = setting(
        True, help="Start without a change. False: start random, for tests.", label="Initialisation", advanced=True
    )
    fan_in_fan_out: bool = setting(
        False, help="PEFT's; nbtune sees for itself which way round a weight is stored.", advanced=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.boft_block_num) == bool(self.boft_block_size):
            must = f"must be 0 if boft_block_size ({self.boft_block_size}) is not, and only then"
            raise invalid("boft_block_num", self.boft_block_num, must)
