"""BEFT's settings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nbtune.peft.config import LayerConfig, setting


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class BeftConfig(LayerConfig):
    """Biases of the value projections (arXiv:2509.15974). Names and defaults are those of peft 0.21."""

    peft_type: ClassVar[str] = "BEFT"
    absent: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern")

    init_weights: bool = setting(
        True,
        help="Start at 0, without a change. False: start random, for tests.",
        label="Initialisation",
        advanced=True,
    )
