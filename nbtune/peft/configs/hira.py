"""HiRA's settings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nbtune.peft.config import LayerConfig, setting


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class HiraConfig(LayerConfig):
    """Hadamard high-rank adapters (Huang et al., ICLR 2025). Names and defaults are those of peft 0.21."""

    peft_type: ClassVar[str] = "HIRA"

    r: int = setting(
        32, help="Rank of the factor that the weight is multiplied by.", label="Rank r", ge=1, sweepable=True
    )
    hira_dropout: float = setting(
        0.0, help="Share of the adapter's inputs dropped in training.", label="Dropout", ge=0, lt=1, sweepable=True
    )
    init_weights: bool | str | None = setting(
        True,
        help="First weights: True (uniform A, zero B), gaussian (normal A, zero B), or False (both random, for tests).",
        label="Initialisation",
        choices=(True, False, "gaussian", None),
        advanced=True,
    )
    rank_pattern: dict[str, int] = setting(
        factory=dict, help="Another rank for some modules: a name or regular expression and its rank.", advanced=True
    )
    fan_in_fan_out: bool = setting(
        False, help="PEFT's; nbtune sees for itself which way round a weight is stored.", advanced=True
    )
