"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al. 2021, arXiv:2106.09685.

    y = W x + s B A x        W [out, in], A [r, in], B [out, r]; s = alpha / r, or alpha / sqrt(r) with rsLoRA

rsLoRA is Kalajdzievski 2023, arXiv:2312.03732.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nbtune.peft.base import empty, features, zeros
from nbtune.peft.configs.lora import LoraConfig
from nbtune.peft.layer import Adapter
from nbtune.peft.rows import Group
from nbtune.peft.targets import of_pattern


class Lora(Adapter):
    """One low-rank update. The parameters are in fp32 and are cast to the input's precision to compute."""

    file_names: ClassVar[dict[str, str]] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    def __init__(self, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(lora_A)  # [r, in]
        self.lora_B = nn.Parameter(lora_B)  # [out, r]
        self.scaling = scaling
        self.dropout = dropout

    @classmethod
    def create(cls, base: nn.Module, config: LoraConfig, path: str, shared: None) -> Self:
        r = of_pattern(config.rank_pattern, path, config.r)
        alpha = of_pattern(config.alpha_pattern, path, config.lora_alpha)
        out_features, in_features = features(base)
        lora_A, lora_B = empty(base, r, in_features), zeros(base, out_features, r)
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(lora_A, std=1 / r)
        else:
            nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))  # as nn.Linear
        if config.init_lora_weights is False:
            nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))
        return cls(lora_A, lora_B, alpha / math.sqrt(r) if config.use_rslora else alpha / r, config.lora_dropout)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Return y + s B A x, for x [..., in] and y [..., out]."""
        # Straight from the dict and by identity: each nn.Module attribute costs as much as a small kernel on a CPU.
        A, B = self._parameters["lora_A"], self._parameters["lora_B"]
        assert A is not None
        assert B is not None
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        if A.dtype is not x.dtype:
            A = A.to(x.dtype)
        if B.dtype is not y.dtype:
            B = B.to(y.dtype)
        out, r = B.shape
        hidden = F.linear(x, A).reshape(-1, r)  # [tokens, r]
        # addmm scales and accumulates in the matmul itself: no activation-sized product, no separate addition.
        if torch.is_grad_enabled() or not y.is_contiguous():
            return torch.addmm(y.reshape(-1, out), hidden, B.t(), alpha=self.scaling).view_as(y)
        y.view(-1, out).addmm_(hidden, B.t(), alpha=self.scaling)
        return y

    def delta_weight(self, base: nn.Module) -> Tensor:
        """Return s B A, [out, in]."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def batch_key(self) -> Hashable:
        """Ranks and scalings may differ: short ranks are filled up with zeros."""
        return (type(self), self.dropout if self.training else 0.0)

    @classmethod
    def forward_rows(cls, adapters: Sequence[Self], group: Group, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """y_b + s_b B_b A_b x_b for every row b, in two batched products."""
        first, rank = adapters[0], max(adapter.lora_A.shape[0] for adapter in adapters)
        if first.dropout and first.training:
            x = F.dropout(x, first.dropout)
        A = torch.stack([_padded(adapter.lora_A, rank, 0) for adapter in adapters]).to(x.dtype)  # [adapters, r, in]
        B = torch.stack([_padded(adapter.scaling * adapter.lora_B, rank, 1) for adapter in adapters]).to(y.dtype)
        if not group.in_order:
            A, B = A[group.index], B[group.index]
        rows = len(group.which)
        hidden = torch.bmm(x.reshape(rows, -1, x.shape[-1]), A.mT)  # [rows, tokens, r]
        return torch.baddbmm(y.reshape(rows, -1, y.shape[-1]), hidden, B.mT).view_as(y)

    def extra_repr(self) -> str:
        return f"r={self.lora_A.shape[0]}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def _padded(tensor: Tensor, rank: int, dim: int) -> Tensor:
    """The tensor with zeros to `rank` at the end of a dimension."""
    missing = rank - tensor.shape[dim]
    return tensor if not missing else F.pad(tensor, (0, 0, 0, missing) if dim == 0 else (0, missing))
