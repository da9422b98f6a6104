"""HRA's settings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nbtune.peft.config import BiasedConfig, setting


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class HRAConfig(BiasedConfig):
    """Householder reflections (Yuan et al. 2024, arXiv:2405.17484). Names and defaults are those of peft 0.21."""

    peft_type: ClassVar[str] = "HRA"
    only: ClassVar[str] = "hra_only"

    r: int = setting(
        8, help="Number of reflections; an even number starts without a change.", label="Rank r", ge=1, sweepable=True
    )
    apply_GS: bool = setting(
        False,
        help="Keep the reflections orthogonal to each other (Gram-Schmidt). The model then starts changed.",
        label="Gram-Schmidt",
        advanced=True,
        sweepable=True,
    )
    init_weights: bool = setting(
        True, help="Start without a change. False: start random, for tests.", label="Initialisation", advanced=True
    )
