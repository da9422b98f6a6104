"""What OFT, BOFT and HRA have in common: y = W R^T x, a rotation of the layer's input before it meets the weight."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nbtune.errors import AdapterError
from nbtune.modules.base import CONVOLUTIONS, LINEARS, apply_weight, compute_dtype, features, weight_of
from nbtune.peft.layer import Adapter


class Rotation(Adapter):
    """A rotation R [in, in] of a linear layer's input, or of a convolution's kernel, [channels * kernel] as `in`.

    Several adapters on a linear layer rotate one after the other; on a convolution their changes of the kernel add up.
    """

    bases: ClassVar[tuple[type[nn.Module], ...]] = (*LINEARS, *CONVOLUTIONS)
    rotates: ClassVar[bool] = True

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.of_input = isinstance(base, LINEARS)

    def turned(self, x: Tensor, *, transposed: bool = False, drop: bool = False) -> Tensor:
        """Return x R, or x R^T, for x [..., in], in x's precision; `drop`: with the method's dropout."""
        raise NotImplementedError

    def turned_weight(self, weight: Tensor, *, drop: bool = False) -> Tensor:
        """Return W R^T for W [out, ...]."""
        return self.turned(weight.flatten(1), transposed=True, drop=drop).view_as(weight)

    def before(self, x: Tensor) -> Tensor:
        """Return x R for a linear layer's input."""
        return self.turned(x, drop=self.training) if self.of_input else x

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        if self.of_input:
            return y
        return y + apply_weight(base, x, self.delta_weight(base, drop=self.training))

    def delta_weight(self, base: nn.Module, *, drop: bool = False) -> Tensor:
        weight = weight_of(base).to(compute_dtype(base))
        return self.turned_weight(weight, drop=drop) - weight

    def merged_weight(self, weight: Tensor, base: nn.Module) -> Tensor:
        return weight + self.delta_weight(base) if isinstance(base, CONVOLUTIONS) else self.turned_weight(weight)


def inputs(base: Any, path: str, method: str) -> int:
    """The size of what is rotated. Raises AdapterError for a convolution in groups."""
    if not isinstance(base, CONVOLUTIONS):
        return features(base)[1]
    if base.groups > 1:
        message = f"{path} is a convolution in {base.groups} groups; {method} rotates all channels together."
        raise AdapterError("A convolution in groups", message, "Name it in exclude_modules.")
    return base.weight[0].numel()


def turned_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Return x R for x [..., in] and the blocks [in / b, b, b] on the diagonal of R."""
    parts = x.to(blocks.dtype).unflatten(-1, blocks.shape[:2])
    return torch.einsum("...nk,nkc->...nc", parts, blocks).flatten(-2).to(x.dtype)


def cayley(Q: Tensor) -> Tensor:
    """Return the rotations (I - Q)(I + Q)^-1 for skew-symmetric Q [..., b, b]."""
    one = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return torch.linalg.solve(one + Q, one - Q, left=False)


def dropped(blocks: Tensor, p: float) -> Tensor:
    """Blocks [factors, n, b, b] with a share p of those of one factor, drawn at random, replaced by the identity."""
    factors, n, size, _ = blocks.shape
    # Drawn as PEFT draws, and on the CPU, so that a seed means the same blocks there, here, and on every device.
    factor = torch.arange(factors) == (torch.randint(0, factors, (1,)) if factors > 1 else 0)
    out = factor[:, None] & (torch.randperm(n) < int(p * n))
    one = torch.eye(size, dtype=blocks.dtype, device=blocks.device)
    return torch.where(out.to(blocks.device)[..., None, None], one, blocks)


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of a number that is nearest to the one wanted; of two, the lower."""
    return min((n for n in range(1, number + 1) if number % n == 0), key=lambda n: abs(n - wanted))
