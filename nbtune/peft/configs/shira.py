"""SHiRA's settings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nbtune.peft.config import LayerConfig, invalid, setting


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class ShiraConfig(LayerConfig):
    """A few trained entries of the weight itself (Bhardwaj et al. 2024, arXiv:2406.13175)."""

    peft_type: ClassVar[str] = "SHIRA"
    absent: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern")

    r: int = setting(
        32,
        help="Trained entries as in LoRA of this rank, r (in + out); the update's rank is high.",
        label="Size r",
        ge=1,
        sweepable=True,
    )
    mask_type: str = setting(
        "random",
        help="Which entries: random. A file with another word brings its entries with it.",
        label="Mask",
        advanced=True,
    )
    random_seed: int | None = setting(
        None, help="Seed of the random entries; None is a fixed seed too.", label="Seed", advanced=True
    )
    init_weights: bool = setting(
        True, help="Start from zeros; if not, from normal values, for tests.", label="Start from zeros", advanced=True
    )
    fan_in_fan_out: bool = False  # written by PEFT; a layer shows by its kind how it stores its weight

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_type != "random" and self.peft_version is None:
            raise invalid("mask_type", self.mask_type, "must be 'random'; other masks come with a file of PEFT")
