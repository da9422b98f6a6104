"""RoAd's settings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nbtune.peft.config import LayerConfig, invalid, setting


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class RoadConfig(LayerConfig):
    """2D rotary adaptation (Liao and Monz 2024, arXiv:2409.00119). Names and defaults are those of peft 0.21."""

    peft_type: ClassVar[str] = "ROAD"
    absent: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern")

    variant: str = setting(
        "road_1",
        help="Angles and scales: road_1 has one of each per pair of outputs, road_2 per output, road_4 two per output.",
        label="Variant",
        choices=("road_1", "road_2", "road_4"),
        sweepable=True,
    )
    group_size: int = setting(
        64, help="Outputs are paired across the halves of groups of this size.", label="Group size", ge=2, advanced=True
    )
    init_weights: bool = setting(
        True, help="Start without a change. False: start random, for tests.", label="Initialisation", advanced=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size % 2:
            raise invalid("group_size", self.group_size, "must be even, since outputs are rotated in pairs")
