"""C3A's settings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nbtune.peft.config import BiasedConfig, setting


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class C3AConfig(BiasedConfig):
    """Circular convolutions, block by block (Chen et al. 2024, arXiv:2407.19342)."""

    peft_type: ClassVar[str] = "C3A"
    only: ClassVar[str] = "c3a_only"
    absent: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    block_size: int = setting(
        256,
        help="Size of a block, a divisor of each layer's sizes; larger blocks are fewer parameters.",
        label="Block size",
        ge=1,
        sweepable=True,
    )
    block_size_pattern: dict[str, int] = setting(
        factory=dict, help="Another size for some modules: a name or regular expression and the size.", advanced=True
    )
    init_weights: bool | str = setting(
        "xavier_uniform",
        help="First weights: uniform (False is xavier_uniform), normal, or True for zeros.",
        label="Initialisation",
        choices=("xavier_uniform", "kaiming_uniform", "gaussian", True, False),
        advanced=True,
    )
