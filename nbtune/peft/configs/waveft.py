"""WaveFT's settings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nbtune.peft.config import BiasedConfig, setting

# Those for which PEFT has a filter that works. Its config takes the names of 50 more, and its layers then fail.
WAVELETS = (*(f"db{n}" for n in range(1, 11)), *(f"sym{n}" for n in range(2, 11)), "coif1", "coif2", "coif3", "coif4")


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class WaveFTConfig(BiasedConfig):
    """A few trained wavelet coefficients of the update (Bilican et al. 2025, arXiv:2505.12532)."""

    peft_type: ClassVar[str] = "WAVEFT"
    only: ClassVar[str] = "waveft_only"

    n_frequency: int = setting(
        2592, help="Trained wavelet coefficients of each update.", label="Coefficients", ge=1, sweepable=True
    )
    scaling: float = setting(25.0, help="Strength of the update.", label="Scaling", gt=0, sweepable=True)
    wavelet_family: str = setting(
        "db1", help="The wavelet: db1 is Haar's; longer ones are smoother.", label="Wavelet", choices=WAVELETS
    )
    use_idwt: bool = setting(
        True, help="Without the transform, the trained values are entries of the weight itself.", label="Transform"
    )
    random_loc_seed: int = setting(777, help="Seed of the coefficients' places.", label="Seed", advanced=True)
    n_frequency_pattern: dict[str, int] = setting(
        factory=dict,
        help="Another number for some modules: a name or regular expression and the number.",
        advanced=True,
    )
    proportional_parameters: bool = setting(
        False, help="Share all coefficients out by the layers' sizes instead.", label="By size", advanced=True
    )
    init_weights: bool = setting(
        True, help="Start from zeros; if not, from small normal values.", label="Start from zeros", advanced=True
    )
    fan_in_fan_out: bool = False  # written by PEFT; a layer shows by its kind how it stores its weight
