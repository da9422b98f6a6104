"""What LoHa and LoKr have in common, as in LyCORIS (Yeh et al. 2023, arXiv:2309.14859).

Both build an update of the weight, of a linear layer or a convolution, from a few small matrices by name, and drop
rows of it (`rank_dropout`) or the whole of it (`module_dropout`) in training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from nbtune.modules.base import CONVOLUTIONS, LINEARS, apply_weight, features, linear_init
from nbtune.modules.paths import of_pattern
from nbtune.peft.configs.low_rank import LycorisConfig
from nbtune.peft.layer import Adapter

Shapes = dict[str, tuple[int, ...]]


class Lycoris(Adapter):
    """An update made of the named matrices that `shapes` gives."""

    bases: ClassVar[tuple[type[nn.Module], ...]] = (*LINEARS, *CONVOLUTIONS)

    def __init__(self, tensors: Mapping[str, Tensor], scaling: float, config: LycorisConfig) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))
        self.scaling = scaling
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout
        self.scale_rows = True  # whether the rows that rank_dropout leaves are scaled up, so that their mean stays

    @classmethod
    def shapes(cls, out: int, inner: int, kernel: tuple[int, ...], r: int, config: Any) -> Shapes:
        """The matrices' shapes for a weight [out, inner, *kernel]."""
        raise NotImplementedError

    @classmethod
    def first_zero(cls, names: list[str], config: Any) -> str:
        """The name of the matrix that starts at zero, so that the update does."""
        raise NotImplementedError

    @classmethod
    def create(cls, base: Any, config: Any, path: str, shared: None) -> Self:
        r = of_pattern(config.rank_pattern, path, config.r)
        alpha = of_pattern(config.alpha_pattern, path, config.alpha)
        out, inner = features(base)
        kernel = ()
        if isinstance(base, CONVOLUTIONS):
            inner, kernel = inner // base.groups, base.kernel_size
        tensors = {name: linear_init(base, *shape) for name, shape in cls.shapes(out, inner, kernel, r, config).items()}
        if config.init_weights is not False:
            tensors[cls.first_zero(list(tensors), config)].zero_()
        return cls(tensors, alpha / r, config)

    def linear(self, x: Tensor) -> Tensor:
        """What the update of a linear layer gives for x [..., in]."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        delta = self.linear(x) if isinstance(base, LINEARS) else apply_weight(base, x, self.delta_weight(base))
        if self.training and (self.rank_dropout or self.module_dropout):
            delta = delta * self._kept(base, delta)
        return y + delta.to(y.dtype)

    def _kept(self, base: Any, delta: Tensor) -> Tensor:
        """A factor for each row of the update, 0 where it is dropped, in a shape that multiplies the output."""
        keep = (torch.rand(features(base)[0], device=delta.device) >= self.rank_dropout).to(delta.dtype)
        if self.rank_dropout and self.scale_rows:
            keep = keep / keep.mean().clamp_min(1 / len(keep))
        keep = keep * (torch.rand((), device=delta.device) >= self.module_dropout)
        return keep if isinstance(base, LINEARS) else keep.view(-1, *[1] * len(base.kernel_size))


def effective_kernel(kernel: tuple[int, ...], config: LycorisConfig) -> tuple[int, ...]:
    """The kernel's own dimensions in the decomposition, or () where it is one with the input's.

    As in PEFT a kernel of one dimension gets a second of size 1, and one of a single point is no kernel.
    """
    if not config.use_effective_conv2d or math.prod(kernel) == 1:
        return ()
    return (*kernel, 1) if len(kernel) == 1 else kernel
