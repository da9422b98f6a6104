"""LoKr's settings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nbtune.peft.config import invalid, setting
from nbtune.peft.configs.lycoris import LycorisConfig


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class LoKrConfig(LycorisConfig):
    """Kronecker products of two small matrices (Yeh et al. 2023, arXiv:2309.14859)."""

    peft_type: ClassVar[str] = "LOKR"

    decompose_factor: int = setting(
        -1,
        help="Rows and columns of the left matrix: the largest divisors of the layer's sizes up to this; -1: up to "
        "their square roots.",
        label="Left size",
        sweepable=True,
    )
    decompose_both: bool = setting(
        False, help="Make the left matrix of low rank too, where it is larger than 2 r.", advanced=True
    )
    rank_dropout_scale: bool = setting(
        False, help="Scale up what rank_dropout leaves, so that its mean stays.", advanced=True
    )
    init_weights: bool | str = setting(
        True,
        help="First weights: True (zero left matrix), lycoris (zero right matrix), or False (random: for tests).",
        label="Initialisation",
        choices=(True, False, "lycoris"),
        advanced=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise invalid("decompose_factor", self.decompose_factor, "must be -1 or at least 1")
