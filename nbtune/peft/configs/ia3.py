"""IA3's settings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nbtune.errors import AdapterError
from nbtune.peft.config import LayerConfig, check_regex, setting


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class IA3Config(LayerConfig):
    """Scaled activations (Liu et al. 2022, arXiv:2205.05638). Names and defaults are those of peft 0.21."""

    peft_type: ClassVar[str] = "IA3"
    absent: ClassVar[tuple[str, ...]] = ("layers_to_transform", "layers_pattern")

    feedforward_modules: list[str] | str | None = setting(
        None,
        help="Those of the adapted modules whose input is scaled instead of the output: endings of paths, or a regular "
        "expression. None: the last linear layer of each feedforward block.",
        label="Feedforward modules",
        advanced=True,
    )
    init_ia3_weights: bool = setting(
        True,
        help="Start at 1, without a change. False: start random, for tests.",
        label="Initialisation",
        advanced=True,
    )
    fan_in_fan_out: bool = False  # written by PEFT; a layer shows by its kind how it stores its weight

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, str):
            check_regex("feedforward_modules", self.feedforward_modules)
        elif isinstance(self.target_modules, list):
            targets = self.target_modules
            named = self.feedforward_modules or []
            # Endings of targets are fine: PEFT writes such files for all-linear (and then cannot read them itself).
            strangers = [name for name in named if not any(target.endswith(name) for target in targets)]
            if strangers:
                message = f"{', '.join(strangers)}: named in feedforward_modules and not in target_modules."
                raise AdapterError("Feedforward modules are adapted ones", message, "Name them in both.")
