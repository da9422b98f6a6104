"""LoKr: Kronecker products. LyCORIS, Yeh et al. 2023, arXiv:2309.14859.

    W' = W + s L (x) R        L [a, c], R [b, d], out = a b, in = c d; s = alpha / r

R, and L too with decompose_both, are products of rank r where that is smaller. The update of a linear layer is never
built.
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from nbtune.kernels.structured import kronecker_product, tucker_product
from nbtune.modules.base import LINEARS
from nbtune.peft.methods.lycoris import Lycoris, Shapes, effective_kernel


class LoKr(Lycoris):
    """The Kronecker product of two matrices, each whole or as a product of low rank."""

    lokr_w1: Tensor  # [a, c], or
    lokr_w1_a: Tensor  # [a, r]
    lokr_w1_b: Tensor  # [r, c]
    lokr_w2: Tensor  # [b, d, *kernel], or
    lokr_w2_a: Tensor  # [b, r], of a Tucker product [r, b]
    lokr_w2_b: Tensor  # [r, d * kernel], of a Tucker product [r, d]
    lokr_t2: Tensor  # [r, r, *kernel], of a Tucker product only

    @classmethod
    def create(cls, base: Any, config: Any, path: str, shared: None) -> Self:
        adapter = super().create(base, config, path, shared)
        adapter.scale_rows = config.rank_dropout_scale
        return adapter

    @classmethod
    def shapes(cls, out: int, inner: int, kernel: tuple[int, ...], r: int, config: Any) -> Shapes:
        (a, b), (c, d) = factors(out, config.decompose_factor), factors(inner, config.decompose_factor)
        left: Shapes = {"lokr_w1": (a, c)}
        if config.decompose_both and r < max(a, c) / 2:
            left = {"lokr_w1_a": (a, r), "lokr_w1_b": (r, c)}
        if r >= max(b, d) / 2:
            return {**left, "lokr_w2": (b, d, *kernel)}
        if effective := effective_kernel(kernel, config):
            return {**left, "lokr_t2": (r, r, *effective), "lokr_w2_a": (r, b), "lokr_w2_b": (r, d)}
        return {**left, "lokr_w2_a": (b, r), "lokr_w2_b": (r, d * math.prod(kernel))}

    @classmethod
    def first_zero(cls, names: list[str], config: Any) -> str:
        either = ("lokr_w2", "lokr_w2_b") if config.init_weights == "lycoris" else ("lokr_w1", "lokr_w1_a")
        return next(name for name in either if name in names)

    def _left(self) -> Tensor:
        return self.lokr_w1 if "lokr_w1" in self._parameters else self.lokr_w1_a @ self.lokr_w1_b

    def delta_weight(self, base: Any) -> Tensor:
        left = self.scaling * self._left()
        if "lokr_w2" in self._parameters:
            right = self.lokr_w2
        elif "lokr_t2" in self._parameters:
            right = tucker_product(self.lokr_t2, self.lokr_w2_a, self.lokr_w2_b)
        else:
            right = self.lokr_w2_a @ self.lokr_w2_b
        if right.ndim > 3:
            left = left.reshape(*left.shape, *[1] * (right.ndim - 2))
        # [a, c] and [b, d, kernel] give [b, a d, c kernel], whose elements are then read in the weight's order: no
        # Kronecker product of the channels, but what PEFT's files mean. With a fourth dimension it is one.
        weight = torch.kron(left, right.contiguous())
        return weight if isinstance(base, LINEARS) else weight.reshape(base.weight.shape)

    def linear(self, x: Tensor) -> Tensor:
        left = (self.scaling * self._left()).to(x.dtype)
        right = (self.lokr_w2,) if "lokr_w2" in self._parameters else (self.lokr_w2_a, self.lokr_w2_b)
        return kronecker_product(x, left, *(factor.to(x.dtype) for factor in right))


def factors(size: int, factor: int) -> tuple[int, int]:
    """`factor` times another number where it divides `size`, else the largest divisor up to it (-1: the root) first."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = next(number for number in range(limit, 0, -1) if size % number == 0)
    return first, size // first
