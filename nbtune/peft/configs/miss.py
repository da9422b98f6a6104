"""MiSS's settings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nbtune.peft.config import BiasedConfig, setting


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class MissConfig(BiasedConfig):
    """One matrix for the sum of the input's shards; formerly Bone (Kang and Yin 2024, arXiv:2409.15371)."""

    peft_type: ClassVar[str] = "MISS"
    only: ClassVar[str] = "MiSS_only"

    r: int = setting(
        64, help="Size of the shards that the input is cut into.", label="Shard size r", ge=1, sweepable=True
    )
    miss_dropout: float = setting(
        0.0, help="Share of the adapter's inputs dropped in training.", label="Dropout", ge=0, lt=1, sweepable=True
    )
    mini_r: int = setting(
        1, help="With mini: outputs of the trained matrix, repeated over all; a divisor of each layer's output.", ge=1
    )
    init_weights: bool | str = setting(
        True,
        help="The variant: True (from zeros), mini (fewer outputs), bat (each shard also meets the base weight), "
        "or False (random, for tests).",
        label="Variant",
        choices=(True, False, "bat", "mini"),
    )
