"""LoHa: low-rank Hadamard products. FedPara, Hyeon-Woo et al. 2021, arXiv:2108.06098; LyCORIS, arXiv:2309.14859.

    W' = W + s (A1 B1) * (A2 B2)        A1, A2 [out, r], B1, B2 [r, in]; * by element; s = alpha / r

The update has a rank of up to r^2.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from nbtune.kernels.structured import hadamard_product, tucker_product
from nbtune.modules.base import LINEARS
from nbtune.peft.methods.lycoris import Lycoris, Shapes, effective_kernel


class LoHa(Lycoris):
    """The Hadamard product of two low-rank matrices, or of two Tucker products for a convolution."""

    hada_w1_a: Tensor  # [out, r], of a Tucker product [r, out]
    hada_w1_b: Tensor  # [r, in * kernel], of a Tucker product [r, in]
    hada_w2_a: Tensor
    hada_w2_b: Tensor
    hada_t1: Tensor  # [r, r, *kernel], of a Tucker product only
    hada_t2: Tensor

    @classmethod
    def shapes(cls, out: int, inner: int, kernel: tuple[int, ...], r: int, config: Any) -> Shapes:
        if effective := effective_kernel(kernel, config):
            core = {"hada_t1": (r, r, *effective), "hada_t2": (r, r, *effective)}
            return {**core, **{f"hada_w{n}_a": (r, out) for n in "12"}, **{f"hada_w{n}_b": (r, inner) for n in "12"}}
        inner *= math.prod(kernel)
        return {**{f"hada_w{n}_a": (out, r) for n in "12"}, **{f"hada_w{n}_b": (r, inner) for n in "12"}}

    @classmethod
    def first_zero(cls, names: list[str], config: Any) -> str:
        return "hada_w2_b"

    def delta_weight(self, base: Any) -> Tensor:
        if "hada_t1" in self._parameters:
            one = tucker_product(self.hada_t1, self.hada_w1_a, self.hada_w1_b)
            two = tucker_product(self.hada_t2, self.hada_w2_a, self.hada_w2_b)
        else:
            one, two = self.hada_w1_a @ self.hada_w1_b, self.hada_w2_a @ self.hada_w2_b
        weight = self.scaling * one * two
        return weight if isinstance(base, LINEARS) else weight.reshape(base.weight.shape)

    def linear(self, x: Tensor) -> Tensor:
        return hadamard_product(x, self.scaling * self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b)
