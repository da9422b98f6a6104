"""Settings of the methods whose layers share what they are made of: random matrices, or a bank of vectors."""

from __future__ import annotations

from nbtune.peft.config import BiasedConfig, invalid
from nbtune.peft.fields import detail, rank, setting, share, strength, unchanged


class ProjectionConfig(BiasedConfig, absent=("exclude_modules",)):
    """What VeRA and RandLoRA share: random matrices that are not trained."""

    r: int = rank()
    projection_prng_key: int = detail(0, "Seed of the random matrices.", label="Seed", ge=0)
    save_projection: bool = detail(
        True, "Store the random matrices in the file instead of making them again from the seed."
    )
    init_weights: bool = unchanged()
    fan_in_fan_out: bool = False


class VeraConfig(ProjectionConfig, peft_type="VERA"):
    """Two trained vectors per layer between random matrices (Kopiczko et al. 2023, arXiv:2310.11454)."""

    r: int = rank(256, "Rank of the random matrices; it costs few parameters.")
    vera_dropout: float = share()
    d_initial: float = detail(0.1, "First value of the inner vector; 0.1 or less works well.", sweepable=True)


class RandLoraConfig(ProjectionConfig, peft_type="RANDLORA"):
    """Full-rank updates as weighted sums of random low-rank matrices (Albert et al. 2025, arXiv:2502.00987)."""

    r: int = rank(32, "Rank of each random matrix. A lower rank needs more of them, so more is trained.")
    randlora_alpha: float = strength(640, "randlora_alpha / r. Usually 20 r; less where training is unstable")
    randlora_dropout: float = share()
    sparse: bool = detail(False, "Random matrices of -1, 0 and 1, two thirds of them 0.")
    very_sparse: bool = detail(
        False, "The same with far more zeros: all but 1 in sqrt(d), d the smaller of the largest sizes."
    )


class VBLoRAConfig(BiasedConfig, peft_type="VBLORA"):
    """Low-rank updates put together from one bank of vectors (Li et al. 2024, arXiv:2405.15179)."""

    r: int = rank(4)
    num_vectors: int = setting(
        256, "Vectors in the bank; more for a larger model.", label="Vectors", ge=1, sweepable=True
    )
    vector_length: int = setting(256, "Length of a vector: a divisor of the sizes of all adapted layers.", ge=1)
    topk: int = setting(2, "Vectors that are mixed in each place; 2 works best.", label="Top k", ge=1, sweepable=True)
    vblora_dropout: float = share()
    save_only_topk_weights: bool = detail(
        False,
        "Store only what the update is made of: a far smaller file, which can serve but not be trained further.",
        label="Small file",
    )
    init_vector_bank_bound: float = detail(0.02, "The bank starts uniform between minus and plus this.", gt=0)
    init_logits_std: float = detail(0.1, "Standard deviation of the first logits.", ge=0)
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk > self.num_vectors:
            raise invalid("topk", self.topk, f"must be at most num_vectors, which is {self.num_vectors}")
