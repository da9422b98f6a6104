"""IA3: Infused Adapter by Inhibiting and Amplifying Inner Activations. Liu et al. 2022, arXiv:2205.05638.

    y = l * (W x + b)        l [out], on attention's keys and values
    y = W (l * x) + b        l [in], on feedforward modules

The first is PEFT's way: it scales the bias too. Of a convolution l has one value per channel.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from nbtune.errors import AdapterError
from nbtune.kernels.low_rank import combine_tensors
from nbtune.modules.base import CONVOLUTIONS, LINEARS, empty, features, ones
from nbtune.peft.configs.vectors import IA3Config
from nbtune.peft.layer import Adapter


class IA3(Adapter):
    """One vector of factors, [out, 1] or [1, in]; of a convolution [1, channels, *1]."""

    bases: ClassVar[tuple[type[nn.Module], ...]] = (*LINEARS, *CONVOLUTIONS)
    rotates: ClassVar[bool] = True
    weighted: ClassVar[bool] = True

    def __init__(self, ia3_l: Tensor, feedforward: bool) -> None:
        super().__init__()
        self.ia3_l = nn.Parameter(ia3_l)
        self.feedforward = feedforward

    @classmethod
    def create(cls, base: Any, config: IA3Config, path: str, shared: None) -> Self:
        names = config.feedforward_modules
        if isinstance(names, str):
            feedforward = re.fullmatch(names, path) is not None
        else:
            feedforward = path.endswith(tuple(names or ()))  # PEFT compares the ends of the paths as text
        size = features(base)[feedforward]
        kernel = [1] * (base.weight.ndim - 2) if isinstance(base, CONVOLUTIONS) else []
        shape = (1, size, *kernel) if feedforward or kernel else (size, 1)
        return cls(ones(base, *shape) if config.init_ia3_weights else empty(base, *shape).normal_(), feedforward)

    def _factors(self) -> Tensor:
        """The factors so that they multiply an activation [..., size] or [batch, channels, ...]."""
        return self.ia3_l if self.ia3_l.ndim > 2 else self.ia3_l.flatten()

    def before(self, x: Tensor) -> Tensor:
        return (x * self._factors()).to(x.dtype) if self.feedforward else x

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return y if self.feedforward else (y * self._factors()).to(y.dtype)

    def merged_weight(self, weight: Tensor, base: Any) -> Tensor:
        factors = self.ia3_l.flatten()
        if not self.feedforward:
            return weight * factors.view(-1, *[1] * (weight.ndim - 1))
        if isinstance(base, CONVOLUTIONS):  # an output channel sees the inputs of its group
            groups = factors.view(base.groups, -1).repeat_interleave(base.out_channels // base.groups, 0)
            return weight * groups.view(*weight.shape[:2], *[1] * (weight.ndim - 2))
        return weight * factors

    def merged_bias(self, bias: Tensor | None, base: nn.Module) -> Tensor | None:
        return bias if bias is None or self.feedforward else bias * self.ia3_l.flatten()

    @classmethod
    def combined(cls, adapters: Sequence[Self], weights: Sequence[float], kind: str, **settings: Any) -> Self:
        """A new adapter from some of one layer: the weighted sum of their vectors, as in PEFT."""
        if kind != "linear":
            message = f"combination_type is {kind!r}; vectors are only summed."
            raise AdapterError("Cannot combine these adapters", message, "Use combination_type='linear'.")
        if len({adapter.feedforward for adapter in adapters}) > 1:
            message = "A module is a feedforward module to one of them and not to another."
            raise AdapterError(
                "Cannot combine these adapters", message, "Combine those with equal feedforward_modules."
            )
        with torch.no_grad():
            return cls(combine_tensors([adapter.ia3_l for adapter in adapters], weights), adapters[0].feedforward)
