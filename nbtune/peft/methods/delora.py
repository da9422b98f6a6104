"""DeLoRA: Decoupling Angles and Strength in Low-Rank Adaptation. Bini et al., ICLR 2025, arXiv:2503.18225.

    y = W x + (l / r) B D A N x        A [r, in], B [out, r]

D = diag(1 / (|a_i| |b_i|)) for the rows a_i of A and the columns b_i of B, N = diag(|w_j|) for the columns w_j of W,
and l is a trained number that bounds the norm of the update.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn
from torch.nn import functional as F

from nbtune.modules.base import compute_dtype, features, linear_init, ones, weight_of, zeros
from nbtune.modules.paths import of_pattern
from nbtune.peft.configs.low_rank import DeloraConfig
from nbtune.peft.layer import Adapter


class Delora(Adapter):
    """One low-rank update of bounded norm. The norms of W's columns are in the file, as in PEFT's."""

    delora_w_norm: Tensor

    def __init__(self, A: Tensor, B: Tensor, strength: Tensor, norms: Tensor, dropout: float) -> None:
        super().__init__()
        self.delora_A = nn.Parameter(A)  # [r, in]
        self.delora_B = nn.Parameter(B)  # [out, r]
        self.delora_lambda = nn.Parameter(strength)  # [1]
        self.register_buffer("delora_w_norm", norms)  # [in]
        self.dropout = dropout

    @classmethod
    def create(cls, base: nn.Module, config: DeloraConfig, path: str, shared: None) -> Self:
        r = of_pattern(config.rank_pattern, path, config.r)
        strength = of_pattern(config.lambda_pattern, path, config.delora_lambda)
        out_features, in_features = features(base)
        A = linear_init(base, r, in_features)
        B = (zeros if config.init_weights else linear_init)(base, out_features, r)
        norms = weight_of(base).detach().to(compute_dtype(base)).norm(dim=0)
        return cls(A, B, strength * ones(base, 1), norms, config.module_dropout)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        hidden = F.linear(x, (self.delora_A * self.delora_w_norm).to(x.dtype))  # [..., r]
        return y + F.linear(hidden, (self.delora_B * self._scales()).to(y.dtype))

    def delta_weight(self, base: nn.Module) -> Tensor:
        """Return (l / r) B D A N, [out, in]."""
        return (self.delora_B * self._scales()) @ (self.delora_A * self.delora_w_norm)

    def _scales(self) -> Tensor:
        """The diagonal [r] of (l / r) D."""
        A, B = self.delora_A.norm(dim=1).clamp(min=1e-4), self.delora_B.norm(dim=0).clamp(min=1e-4)
        return self.delora_lambda / (A.shape[0] * A * B)
