"""Trained biases of the base model (`bias` in a config), as one more adapter: y = W x + b', and b' [out] is trained.

BitFit, Ben Zaken et al. 2021, arXiv:2106.10199. PEFT trains the base model's own biases; here the base stays as it
is, so that disabling the adapter, or another adapter, finds the bias that it knows.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from torch import Tensor, nn

from nbtune.modules.base import CONVOLUTIONS, LINEARS, compute_dtype
from nbtune.peft.layer import PREFIX, Adapter


class Bias(Adapter):
    """One trained bias, stored whole. `targeted`: of a module that the method adapts too, which PEFT's key says."""

    bases: ClassVar[tuple[type[nn.Module], ...]] = (*LINEARS, *CONVOLUTIONS, nn.LayerNorm, nn.GroupNorm)

    def __init__(self, bias: Tensor, targeted: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)
        self.targeted = targeted

    @classmethod
    def create(cls, base: Any, config: Any, path: str, shared: bool) -> Self:
        return cls(base.bias.detach().to(compute_dtype(base), copy=True), shared)

    def forward(self, x: Tensor, y: Tensor, base: Any) -> Tensor:
        """Return y - b + b'."""
        change = (self.bias - base.bias).to(y.dtype)
        return y + change.reshape(-1, *[1] * (y.ndim - 2)) if isinstance(base, CONVOLUTIONS) else y + change

    def merged_weight(self, weight: Tensor, base: nn.Module) -> Tensor:
        return weight

    def merged_bias(self, bias: Tensor | None, base: Any) -> Tensor:
        """Return b + (b' - base b)."""
        change = self.bias - base.bias
        return change if bias is None else bias + change

    def file_prefix(self, path: str) -> str:
        return f"{PREFIX}{path}.base_layer." if self.targeted else f"{PREFIX}{path}."
