"""LN tuning: Tuning LayerNorm in Attention. Zhao et al. 2023, arXiv:2312.11420.

    y = w' * normalised(x) + b'        w' and b' [dim]

A norm is trained whole, in the precision that it has, as is any other module that the config names.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor, nn

from nbtune.errors import AdapterError
from nbtune.peft.configs.vectors import LNTuningConfig
from nbtune.peft.layer import SavedModule


class LNTuning(SavedModule):
    """A trained copy of a norm."""

    @classmethod
    def share(cls, config: LNTuningConfig, bases: Mapping[str, nn.Module]) -> None:
        for path in bases:
            outer = next((other for other in bases if path.startswith(f"{other}.")), None)
            if outer is not None:
                message = f"{path} is part of {outer}, which is trained whole."
                raise AdapterError("A module is named twice", message, "Name one of them in target_modules.")

    @classmethod
    def create(cls, base: nn.Module, config: LNTuningConfig, path: str, shared: None) -> Self:
        return cls(copy.deepcopy(base))

    def saved(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # PEFT leaves its adapter's name in the names of modules that have modules inside.
        names = {name: name.removeprefix("module.") for name in state}
        inner = {name: f"default.{short}" if "." in short else short for name, short in names.items()}
        return {f"ln_tuning_layers.{inner[name]}": tensor for name, tensor in state.items()}

    @classmethod
    def forward_several(cls, adapters: Sequence[Self], base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(adapters) > 1:
            message = f"{len(adapters)} active adapters replace one {type(base).__name__}."
            raise AdapterError("Several trained norms", message, "Switch to one of them with set_adapter.")
        return super().forward_several(adapters, base, x, *args, **kwargs)
