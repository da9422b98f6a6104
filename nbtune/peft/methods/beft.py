"""BEFT: Bias-Efficient Fine-Tuning of Language Models in Low-Data Regimes. arXiv:2509.15974.

    y = W x + b + b'        b' [out], on the value projections

Merging gives a layer without a bias one; PEFT refuses that.
"""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, nn

from nbtune.modules.base import features, zeros
from nbtune.peft.configs.vectors import BeftConfig
from nbtune.peft.layer import Adapter


class Beft(Adapter):
    """One bias, [1, out]."""

    def __init__(self, beft_bias: Tensor) -> None:
        super().__init__()
        self.beft_bias = nn.Parameter(beft_bias)

    @classmethod
    def create(cls, base: Any, config: BeftConfig, path: str, shared: None) -> Self:
        bias = zeros(base, 1, features(base)[0])
        return cls(bias if config.init_weights else bias.normal_())

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return (y + self.beft_bias.flatten()).to(y.dtype)

    def merged_weight(self, weight: Tensor, base: nn.Module) -> Tensor:
        return weight

    def merged_bias(self, bias: Tensor | None, base: nn.Module) -> Tensor:
        return self.beft_bias.flatten() if bias is None else bias + self.beft_bias.flatten()
