"""GraLoRA: Granular Low-Rank Adaptation. Jung et al. 2025, arXiv:2505.20355.

    W'_mn = W_mn + s B_mn A_mn        W in k x k blocks [out / k, in / k], each update of rank r / k
    s = alpha / (r + hybrid_r); with hybrid_r, s B A of that rank is added to the whole weight as well

Stored are A [k, in / k, r] by columns n of blocks and B [k, r, out / k] by rows m.
"""

from __future__ import annotations

import math
from typing import ClassVar, Self

from torch import Tensor, nn
from torch.nn import functional as F

from nbtune.kernels.structured import granular, granular_product
from nbtune.modules.base import empty, features, require_divisor
from nbtune.peft.configs.low_rank import GraloraConfig
from nbtune.peft.layer import Adapter


class Gralora(Adapter):
    """k x k low-rank updates, and perhaps one of the whole weight."""

    file_names: ClassVar[dict[str, str]] = {
        "A_general": "gralora_A_general.weight",
        "B_general": "gralora_B_general.weight",
    }

    def __init__(
        self, gralora_A: Tensor, gralora_B: Tensor, A_general: Tensor, B_general: Tensor, scaling: float, dropout: float
    ) -> None:
        super().__init__()
        self.gralora_A = nn.Parameter(gralora_A)  # [k, in / k, r]
        self.gralora_B = nn.Parameter(gralora_B)  # [k, r, out / k]
        hybrid = A_general.shape[0] > 0
        self.A_general = nn.Parameter(A_general) if hybrid else None  # [hybrid_r, in]
        self.B_general = nn.Parameter(B_general) if hybrid else None  # [out, hybrid_r]
        self.scaling = scaling
        self.dropout = dropout

    @classmethod
    def create(cls, base: nn.Module, config: GraloraConfig, path: str, shared: None) -> Self:
        out_features, in_features = features(base)
        k, r, hybrid_r = config.gralora_k, config.r, config.hybrid_r
        require_divisor(base, path, "gralora_k", k)
        A, B = empty(base, k, in_features // k, r), empty(base, k, r, out_features // k)
        A_general, B_general = empty(base, hybrid_r, in_features), empty(base, out_features, hybrid_r)
        for tensor, inputs in ((A, in_features // k), (B, r), (A_general, in_features), (B_general, hybrid_r)):
            tensor.uniform_(-1, 1).div_(math.sqrt(max(inputs, 1)))  # as nn.Linear
        if config.init_weights:
            B.zero_()
            B_general.zero_()
        return cls(A, B, A_general, B_general, config.alpha / (r + hybrid_r), config.gralora_dropout)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        added = granular_product(x, self.gralora_A.to(x.dtype), self.gralora_B.to(x.dtype))
        if self.A_general is not None and self.B_general is not None:
            added = added + F.linear(F.linear(x, self.A_general.to(x.dtype)), self.B_general.to(x.dtype))
        return y + (self.scaling * added).to(y.dtype)

    def delta_weight(self, base: nn.Module) -> Tensor:
        delta = granular(self.gralora_A, self.gralora_B)
        if self.A_general is not None and self.B_general is not None:
            delta = delta + self.B_general @ self.A_general
        return self.scaling * delta
