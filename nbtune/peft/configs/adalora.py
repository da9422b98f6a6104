"""AdaLoRA's settings."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, ClassVar

from nbtune.errors import AdapterError
from nbtune.peft.config import invalid, pending, setting
from nbtune.peft.configs.lora import LoraConfig


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class AdaLoraConfig(LoraConfig):
    """Low-rank adapters that move rank to where it counts (Zhang et al. 2023, arXiv:2303.10512).

    Names and defaults are those of peft 0.21, but `total_step` may wait: a run knows how many steps it has.
    """

    peft_type: ClassVar[str] = "ADALORA"

    r: int = 8  # not used, as in PEFT
    target_r: int = setting(8, help="Mean rank at the end.", label="Final rank", ge=1, sweepable=True)
    init_r: int = setting(12, help="Rank of every module at the start.", label="First rank", ge=1, sweepable=True)
    tinit: int = setting(0, help="Steps before the first rank is taken away.", unit="steps", ge=0, advanced=True)
    tfinal: int = setting(0, help="Steps at the end in which ranks stay.", unit="steps", ge=0, advanced=True)
    deltaT: int = setting(1, help="Steps from one reallocation to the next.", unit="steps", ge=1, advanced=True)
    beta1: float = setting(0.85, help="Decay of the average of sensitivities.", gt=0, lt=1, advanced=True)
    beta2: float = setting(0.85, help="Decay of the average of their uncertainty.", gt=0, lt=1, advanced=True)
    orth_reg_weight: float = setting(
        0.5, help="Weight of the penalty that keeps A and B orthogonal.", ge=0, advanced=True, sweepable=True
    )
    total_step: int | None = setting(
        None, help="Optimiser steps of the whole training; a run fills it in.", unit="steps", advanced=True
    )
    # Which of the first ranks are left, written after training.
    rank_pattern: dict[str, list[bool]] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    init_lora_weights: bool = setting(
        True, help="Start without a change. False: start random, for tests.", label="Initialisation", advanced=True
    )

    # LoRA's, of which PEFT's AdaLoRA takes no notice.
    alpha_pattern: dict[str, float] = pending({})
    use_rslora: bool = pending(False)
    use_dora: bool = pending(False)
    lora_bias: bool = pending(False)
    target_parameters: list[str] | None = pending()
    loftq_config: dict[str, Any] = pending({})
    eva_config: dict[str, Any] | None = pending()

    @property
    def patterns(self) -> dict[str, dict[str, Any]]:
        return {}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r != 8:
            warnings.warn("AdaLoRA does not use r; its ranks are init_r and target_r.", stacklevel=3)
        if self.total_step is None:
            return
        if self.total_step <= 0:
            raise invalid("total_step", self.total_step, "must be more than 0")
        if self.tinit >= self.total_step - self.tfinal:
            message = f"tinit {self.tinit} and tfinal {self.tfinal} leave nothing of total_step {self.total_step}."
            raise AdapterError("No steps to move ranks in", message, "Lower tinit or tfinal, or train longer.")
