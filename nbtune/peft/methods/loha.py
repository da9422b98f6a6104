"""LoHa: low-rank Hadamard products. FedPara, Hyeon-Woo et al. 2021, arXiv:2108.06098; LyCORIS, arXiv:2309.14859.

    W' = W + s (A1 B1) * (A2 B2)        A1, A2 [out, r], B1, B2 [r, in]; * by element; s = alpha / r

The product has a rank of up to r^2 and is itself low-rank: its factors are the products of all pairs of columns of A1
and A2, and of all pairs of rows of B1 and B2.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from nbtune.modules.base import LINEARS
from nbtune.peft.methods.lycoris import Lycoris, Shapes, effective_kernel, rebuilt


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
            one = rebuilt(self.hada_t1, self.hada_w1_a, self.hada_w1_b)
            two = rebuilt(self.hada_t2, self.hada_w2_a, self.hada_w2_b)
        else:
            one, two = self.hada_w1_a @ self.hada_w1_b, self.hada_w2_a @ self.hada_w2_b
        weight = self.scaling * one * two
        return weight if isinstance(base, LINEARS) else weight.reshape(base.weight.shape)

    def linear(self, x: Tensor) -> Tensor:
        (out, r), inner = self.hada_w1_a.shape, x.shape[-1]
        if r * r * (out + inner) >= out * inner:  # the dense update is the cheaper one
            dense = self.scaling * (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b)
            return F.linear(x, dense.to(x.dtype))
        down = (self.hada_w1_b[:, None] * self.hada_w2_b).flatten(0, 1)  # [r r, in]
        up = self.scaling * (self.hada_w1_a[:, :, None] * self.hada_w2_a[:, None]).flatten(1)  # [out, r r]
        return F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))
