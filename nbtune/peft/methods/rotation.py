"""What OFT, BOFT and HRA have in common: y = W R^T x, a rotation of the layer's input before it meets the weight."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from nbtune.modules.base import CONVOLUTIONS, LINEARS, apply_weight, compute_dtype, features, refuse_groups, weight_of
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


def inputs(base: Any, path: str) -> int:
    """The size of what is rotated. Raises AdapterError for a convolution in groups."""
    refuse_groups(base, path)
    return base.weight[0].numel() if isinstance(base, CONVOLUTIONS) else features(base)[1]


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of a number that is nearest to the one wanted; of two, the lower."""
    return min((n for n in range(1, number + 1) if number % n == 0), key=lambda n: abs(n - wanted))
