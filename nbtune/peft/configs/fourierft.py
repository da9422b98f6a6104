"""FourierFT's settings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nbtune.peft.config import BiasedConfig, setting


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class FourierFTConfig(BiasedConfig):
    """A few trained entries of the update's spectrum (Gao et al. 2024, arXiv:2405.03003)."""

    peft_type: ClassVar[str] = "FOURIERFT"
    only: ClassVar[str] = "fourier_only"

    n_frequency: int = setting(
        1000, help="Trained entries of the spectrum of each update.", label="Frequencies", ge=1, sweepable=True
    )
    scaling: float = setting(150.0, help="Strength of the update.", label="Scaling", gt=0, sweepable=True)
    random_loc_seed: int = setting(777, help="Seed of the places of the trained entries.", label="Seed", advanced=True)
    n_frequency_pattern: dict[str, int] = setting(
        factory=dict,
        help="Another number for some modules: a name or regular expression and the number.",
        advanced=True,
    )
    init_weights: bool = setting(
        False,
        help="Start from zeros instead of normal values, which change the model.",
        label="Start from zeros",
        advanced=True,
    )
    fan_in_fan_out: bool = False  # written by PEFT; a layer shows by its kind how it stores its weight
