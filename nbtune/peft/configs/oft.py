"""OFT's settings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nbtune.peft.config import BiasedConfig, invalid, setting


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class OFTConfig(BiasedConfig):
    """Orthogonal finetuning (Qiu et al. 2023, arXiv:2306.07280). Names and defaults are those of peft 0.21."""

    peft_type: ClassVar[str] = "OFT"
    only: ClassVar[str] = "oft_only"

    # PEFT changed the series in 0.18 and distrusts a file that does not say its version.
    peft_version: str | None = "0.21.2"

    r: int = setting(0, help="Number of blocks per layer, instead of oft_block_size.", ge=0, sweepable=True)
    oft_block_size: int = setting(
        32, help="Size of the rotated blocks; 0: set by r.", label="Block size", ge=0, sweepable=True
    )
    module_dropout: float = setting(
        0.0, help="Share of the blocks left unrotated in a training step.", label="Dropout", ge=0, lt=1, sweepable=True
    )
    coft: bool = setting(False, help="Constrain the rotations to small ones (COFT).", advanced=True)
    eps: float = setting(6e-5, help="Largest rotation with coft.", gt=0, advanced=True, sweepable=True)
    block_share: bool = setting(False, help="One rotation for all blocks of a layer.", advanced=True)
    use_cayley_neumann: bool = setting(
        True, help="Approximate the rotation by a series: faster than the exact Cayley transform.", advanced=True
    )
    num_cayley_neumann_terms: int = setting(5, help="Terms of that series.", ge=2, advanced=True)
    init_weights: bool = setting(
        True, help="Start without a change. False: start random, for tests.", label="Initialisation", advanced=True
    )
    fan_in_fan_out: bool = setting(
        False, help="PEFT's; nbtune sees for itself which way round a weight is stored.", advanced=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.r) == bool(self.oft_block_size):
            must = f"must be 0 if oft_block_size ({self.oft_block_size}) is not, and only then"
            raise invalid("r", self.r, must)
