"""Settings of the methods that rotate or reflect a layer's inputs or outputs."""

from __future__ import annotations

from nbtune.peft.config import BiasedConfig, LayerConfig, invalid
from nbtune.peft.fields import detail, rank, setting, share, unchanged


class OFTConfig(BiasedConfig, peft_type="OFT"):
    """Orthogonal finetuning (Qiu et al. 2023, arXiv:2306.07280)."""

    # PEFT changed the series in 0.18 and distrusts a file that does not say its version.
    peft_version: str | None = "0.21.2"

    r: int = setting(0, "Number of blocks per layer, instead of oft_block_size.", ge=0, sweepable=True)
    oft_block_size: int = setting(
        32, "Size of the rotated blocks; 0: set by r.", label="Block size", ge=0, sweepable=True
    )
    module_dropout: float = share("Share of the blocks left unrotated in a training step.")
    coft: bool = detail(False, "Constrain the rotations to small ones (COFT).")
    eps: float = detail(6e-5, "Largest rotation with coft.", gt=0, sweepable=True)
    block_share: bool = detail(False, "One rotation for all blocks of a layer.")
    use_cayley_neumann: bool = detail(
        True, "Approximate the rotation by a series: faster than the exact Cayley transform."
    )
    num_cayley_neumann_terms: int = detail(5, "Terms of that series.", ge=2)
    init_weights: bool = unchanged()
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.r) == bool(self.oft_block_size):
            must = f"must be 0 if oft_block_size ({self.oft_block_size}) is not, and only then"
            raise invalid("r", self.r, must)


class BOFTConfig(BiasedConfig, peft_type="BOFT"):
    """Orthogonal butterflies (Liu et al. 2023, arXiv:2311.06243)."""

    boft_block_size: int = setting(
        4, "Size of the rotated blocks; 0: set by boft_block_num.", label="Block size", ge=0, sweepable=True
    )
    boft_block_num: int = setting(0, "Number of blocks per layer, instead of boft_block_size.", ge=0, sweepable=True)
    boft_n_butterfly_factor: int = setting(
        1,
        "Rotations in a row, each over pairs of inputs twice as far apart; 1 is OFT with exact rotations.",
        label="Butterfly factors",
        ge=1,
        sweepable=True,
    )
    boft_dropout: float = share("Share of one factor's blocks left unrotated in a training step.")
    init_weights: bool = unchanged()
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.boft_block_num) == bool(self.boft_block_size):
            must = f"must be 0 if boft_block_size ({self.boft_block_size}) is not, and only then"
            raise invalid("boft_block_num", self.boft_block_num, must)


class HRAConfig(BiasedConfig, peft_type="HRA"):
    """Householder reflections (Yuan et al. 2024, arXiv:2405.17484)."""

    r: int = rank(8, "Number of reflections; an even number starts without a change.")
    apply_GS: bool = detail(
        False,
        "Keep the reflections orthogonal to each other (Gram-Schmidt). The model then starts changed.",
        label="Gram-Schmidt",
        sweepable=True,
    )
    init_weights: bool = unchanged()


class RoadConfig(LayerConfig, peft_type="ROAD", absent=("exclude_modules", "layers_to_transform", "layers_pattern")):
    """2D rotary adaptation (Liao and Monz 2024, arXiv:2409.00119)."""

    variant: str = setting(
        "road_1",
        "Angles and scales: road_1 has one of each per pair of outputs, road_2 per output, road_4 two per output.",
        choices=("road_1", "road_2", "road_4"),
        sweepable=True,
    )
    group_size: int = detail(64, "Outputs are paired across the halves of groups of this size.", ge=2)
    init_weights: bool = unchanged()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size % 2:
            raise invalid("group_size", self.group_size, "must be even, since outputs are rotated in pairs")
