"""Settings of the methods whose update is a product of small matrices, other than LoRA's."""

from __future__ import annotations

from nbtune.peft.config import BiasedConfig, LayerConfig, invalid
from nbtune.peft.fields import detail, pattern, rank, setting, share, strength, unchanged


class LycorisConfig(LayerConfig):
    """What LoHa and LoKr share, as in LyCORIS (arXiv:2309.14859): linear layers and convolutions."""

    r: int = rank(8, "Rank of the factors.")
    alpha: float = strength(8, "alpha / r")
    rank_dropout: float = detail(0.0, "Share of the update's rows, one per output, dropped in training.", ge=0, lt=1)
    module_dropout: float = detail(0.0, "How often a layer's whole update is dropped in training.", ge=0, lt=1)
    use_effective_conv2d: bool = detail(
        False, "Keep the kernel's dimensions of a convolution apart (FedPara, proposition 3): fewer parameters."
    )
    init_weights: bool | str = unchanged(choices=(True, False))
    rank_pattern: dict[str, int] = pattern("rank")
    alpha_pattern: dict[str, float] = pattern("alpha")


class LoHaConfig(LycorisConfig, peft_type="LOHA"):
    """Hadamard products of two low-rank updates (Hyeon-Woo et al. 2021, arXiv:2108.06098), of rank up to r^2."""


class LoKrConfig(LycorisConfig, peft_type="LOKR"):
    """Kronecker products of two small matrices (Yeh et al. 2023, arXiv:2309.14859)."""

    decompose_factor: int = setting(
        -1,
        "Rows and columns of the left matrix: the largest divisors of the layer's sizes up to this; -1: up to their "
        "square roots.",
        label="Left size",
        sweepable=True,
    )
    decompose_both: bool = detail(False, "Make the left matrix of low rank too, where it is larger than 2 r.")
    rank_dropout_scale: bool = detail(False, "Scale up what rank_dropout leaves, so that its mean stays.")
    init_weights: bool | str = detail(
        True,
        "First weights: True (zero left matrix), lycoris (zero right matrix), or False (random: for tests).",
        label="Initialisation",
        choices=(True, False, "lycoris"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise invalid("decompose_factor", self.decompose_factor, "must be -1 or at least 1")


class HiraConfig(LayerConfig, peft_type="HIRA"):
    """Hadamard high-rank adapters (Huang et al., ICLR 2025)."""

    r: int = rank(32, "Rank of the factor that the weight is multiplied by.")
    hira_dropout: float = share()
    init_weights: bool | str | None = detail(
        True,
        "First weights: True (uniform A, zero B), gaussian (normal A, zero B), or False (both random, for tests).",
        label="Initialisation",
        choices=(True, False, "gaussian", None),
    )
    rank_pattern: dict[str, int] = pattern("rank")
    fan_in_fan_out: bool = False


class DeloraConfig(BiasedConfig, peft_type="DELORA"):
    """Decoupled low-rank adapters (Bini et al., ICLR 2025)."""

    r: int = rank()
    delora_lambda: float = setting(
        15, "First strength of the update: the bound of its norm. It is trained.", label="Lambda", gt=0, sweepable=True
    )
    module_dropout: float = share()
    init_weights: bool = unchanged()
    rank_pattern: dict[str, int] = pattern("rank")
    lambda_pattern: dict[str, float] = pattern("lambda")


class GraloraConfig(BiasedConfig, peft_type="GRALORA", absent=("exclude_modules",)):
    """A low-rank adapter for each block of the weight (Jung et al. 2025, arXiv:2505.20355)."""

    r: int = rank(32, "Rank: as many parameters as LoRA of this rank.")
    hybrid_r: int = setting(0, "Rank of a plain LoRA beside it; 0 is none.", label="Hybrid rank", ge=0, sweepable=True)
    alpha: float = strength(64, "alpha / (r + hybrid_r)")
    gralora_dropout: float = share()
    gralora_k: int = setting(
        2, "Blocks along each side of the weight, a divisor of r: 2 up to rank 32, 4 above.", label="Blocks k", ge=1
    )
    init_weights: bool = unchanged()
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r % self.gralora_k:
            raise invalid("r", self.r, f"must be a multiple of gralora_k, {self.gralora_k}")


class MissConfig(BiasedConfig, peft_type="MISS"):
    """One matrix for the sum of the input's shards; formerly Bone (Kang and Yin 2024, arXiv:2409.15371)."""

    only = "MiSS_only"
    r: int = rank(64, "Size of the shards that the input is cut into.", label="Shard size r")
    miss_dropout: float = share()
    mini_r: int = setting(
        1, "With mini: outputs of the trained matrix, repeated over all; a divisor of each layer's output.", ge=1
    )
    init_weights: bool | str = setting(
        True,
        "The variant: True (from zeros), mini (fewer outputs), bat (each shard also meets the base weight), or False "
        "(random, for tests).",
        label="Variant",
        choices=(True, False, "bat", "mini"),
    )
