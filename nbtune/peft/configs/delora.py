"""DeLoRA's settings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nbtune.peft.config import BiasedConfig, setting


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class DeloraConfig(BiasedConfig):
    """Decoupled low-rank adapters (Bini et al., ICLR 2025). Names and defaults are those of peft 0.21."""

    peft_type: ClassVar[str] = "DELORA"
    only: ClassVar[str] = "delora_only"

    r: int = setting(8, help="Rank of the update.", label="Rank r", ge=1, sweepable=True)
    delora_lambda: float = setting(
        15,
        help="First strength of the update: the bound of its norm. It is trained.",
        label="Lambda",
        gt=0,
        sweepable=True,
    )
    module_dropout: float = setting(
        0.0, help="Share of the adapter's inputs dropped in training.", label="Dropout", ge=0, lt=1, sweepable=True
    )
    init_weights: bool = setting(
        True, help="Start without a change. False: start random, for tests.", label="Initialisation", advanced=True
    )
    rank_pattern: dict[str, int] = setting(
        factory=dict, help="Another rank for some modules: a name or regular expression and its rank.", advanced=True
    )
    lambda_pattern: dict[str, float] = setting(
        factory=dict,
        help="Another lambda for some modules: a name or regular expression and its lambda.",
        advanced=True,
    )
