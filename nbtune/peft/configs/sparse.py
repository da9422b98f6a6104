"""Settings of the methods that train few numbers: of a spectrum, of a kernel, or of the weight itself."""

from __future__ import annotations

from nbtune.peft.config import BiasedConfig, LayerConfig, invalid
from nbtune.peft.fields import detail, pattern, rank, setting, unchanged

# Those for which PEFT has a filter that works. Its config takes the names of 50 more, and its layers then fail.
WAVELETS = (*(f"db{n}" for n in range(1, 11)), *(f"sym{n}" for n in range(2, 11)), "coif1", "coif2", "coif3", "coif4")


class SpectralConfig(BiasedConfig):
    """What FourierFT and WaveFT share: trained entries of the update's transform, at random places."""

    n_frequency: int = setting(
        1000, "Trained entries of the spectrum of each update.", label="Frequencies", ge=1, sweepable=True
    )
    scaling: float = setting(150.0, "Strength of the update.", gt=0, sweepable=True)
    random_loc_seed: int = detail(777, "Seed of the places of the trained entries.", label="Seed")
    n_frequency_pattern: dict[str, int] = pattern("number")
    fan_in_fan_out: bool = False


class FourierFTConfig(SpectralConfig, peft_type="FOURIERFT"):
    """A few trained entries of the update's spectrum (Gao et al. 2024, arXiv:2405.03003)."""

    only = "fourier_only"

    init_weights: bool = unchanged("Start from zeros instead of normal values, which change the model.", default=False)


class WaveFTConfig(SpectralConfig, peft_type="WAVEFT"):
    """A few trained wavelet coefficients of the update (Bilican et al. 2025, arXiv:2505.12532)."""

    n_frequency: int = setting(
        2592, "Trained wavelet coefficients of each update.", label="Coefficients", ge=1, sweepable=True
    )
    scaling: float = setting(25.0, "Strength of the update.", gt=0, sweepable=True)
    wavelet_family: str = setting(
        "db1", "The wavelet: db1 is Haar's; longer ones are smoother.", label="Wavelet", choices=WAVELETS
    )
    use_idwt: bool = setting(
        True, "Without the transform, the trained values are entries of the weight itself.", label="Transform"
    )
    proportional_parameters: bool = detail(
        False, "Share all coefficients out by the layers' sizes instead.", label="By size"
    )
    init_weights: bool = unchanged("Start from zeros; if not, from small normal values.")


class C3AConfig(BiasedConfig, peft_type="C3A", absent=("exclude_modules",)):
    """Circular convolutions, block by block (Chen et al. 2024, arXiv:2407.19342)."""

    block_size: int = setting(
        256,
        "Size of a block, a divisor of each layer's sizes; larger blocks are fewer parameters.",
        ge=1,
        sweepable=True,
    )
    block_size_pattern: dict[str, int] = pattern("size")
    init_weights: bool | str = detail(
        "xavier_uniform",
        "First weights: uniform (False is xavier_uniform), normal, or True for zeros.",
        label="Initialisation",
        choices=("xavier_uniform", "kaiming_uniform", "gaussian", True, False),
    )


class ShiraConfig(LayerConfig, peft_type="SHIRA", absent=("exclude_modules", "layers_to_transform", "layers_pattern")):
    """A few trained entries of the weight itself (Bhardwaj et al. 2024, arXiv:2406.13175)."""

    r: int = rank(
        32, "Trained entries as in LoRA of this rank, r (in + out); the update's rank is high.", label="Size r"
    )
    mask_type: str = detail(
        "random", "Which entries: random. A file with another word brings its entries with it.", label="Mask"
    )
    random_seed: int | None = detail(None, "Seed of the random entries; None is a fixed seed too.", label="Seed")
    init_weights: bool = unchanged()
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_type != "random" and self.peft_version is None:
            raise invalid("mask_type", self.mask_type, "must be 'random'; other masks come with a file of PEFT")
