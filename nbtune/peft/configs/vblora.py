"""VB-LoRA's settings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nbtune.peft.config import BiasedConfig, invalid, setting


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class VBLoRAConfig(BiasedConfig):
    """Low-rank updates put together from one bank of vectors (Li et al. 2024, arXiv:2405.15179)."""

    peft_type: ClassVar[str] = "VBLORA"
    only: ClassVar[str] = "vblora_only"

    r: int = setting(4, help="Rank of the update.", label="Rank r", ge=1, sweepable=True)
    num_vectors: int = setting(
        256, help="Vectors in the bank; more for a larger model.", label="Vectors", ge=1, sweepable=True
    )
    vector_length: int = setting(
        256, help="Length of a vector: a divisor of the sizes of all adapted layers.", label="Vector length", ge=1
    )
    topk: int = setting(
        2, help="Vectors that are mixed in each place; 2 works best.", label="Top k", ge=1, sweepable=True
    )
    vblora_dropout: float = setting(
        0.0, help="Share of the adapter's inputs dropped in training.", label="Dropout", ge=0, lt=1, sweepable=True
    )
    save_only_topk_weights: bool = setting(
        False,
        help="Store only what the update is made of: a far smaller file, which can serve but not be trained further.",
        label="Small file",
        advanced=True,
    )
    init_vector_bank_bound: float = setting(
        0.02, help="The bank starts uniform between minus and plus this.", gt=0, advanced=True
    )
    init_logits_std: float = setting(0.1, help="Standard deviation of the first logits.", ge=0, advanced=True)
    fan_in_fan_out: bool = setting(
        False, help="Written by PEFT for layers that store their weight transposed; nbtune sees it.", advanced=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk > self.num_vectors:
            raise invalid("topk", self.topk, f"must be at most num_vectors, which is {self.num_vectors}")
