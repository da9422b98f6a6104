"""MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing. Kang and Yin 2024, arXiv:2409.15371.

    y = W x + M^T sum_j x_j        x_j [r]: the shards of x, filled up with zeros; M [r, out]
    mini: M [r, mini_r], its outputs repeated out / mini_r times
    bat:  W'_ij = W_ij + W_ij M_i + M_i        W in blocks [r, r], M [out / r, r, r]

Formerly Bone. Several active bat adapters each start from the base weight and add up.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn
from torch.nn import functional as F

from nbtune.errors import AdapterError
from nbtune.modules.base import features, linear_init, require_divisor, weight_of, zeros
from nbtune.peft.configs.low_rank import MissConfig
from nbtune.peft.layer import Adapter


class Miss(Adapter):
    """One matrix for all shards of the input."""

    def __init__(self, miss_block: Tensor, dropout: float) -> None:
        super().__init__()
        self.miss_block = nn.Parameter(miss_block)  # [r, out], or [r, mini_r], or [out / r, r, r]
        self.dropout = dropout

    @classmethod
    def create(cls, base: nn.Module, config: MissConfig, path: str, shared: None) -> Self:
        out_features, in_features = features(base)
        r, mode = config.r, config.init_weights
        if r > in_features:
            raise _unfit(path, base, f"r {r} is more than its {in_features} inputs", f"r to at most {in_features}")
        if mode == "mini" and out_features % config.mini_r:
            divisor = f"mini_r to a divisor of {out_features}"
            raise _unfit(path, base, f"mini_r {config.mini_r} does not divide its {out_features} outputs", divisor)
        if mode == "bat":
            require_divisor(base, path, "r", r)
            return cls(zeros(base, out_features // r, r, r), 0.0)  # PEFT has no dropout here
        first = linear_init if mode is False else zeros
        return cls(first(base, r, config.mini_r if mode == "mini" else out_features), config.miss_dropout)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        if self.miss_block.ndim == 3:
            return super().forward(x, y, base)
        block = self.miss_block.to(x.dtype)
        r = block.shape[0]
        if x.shape[-1] % r:
            x = F.pad(x, (0, -x.shape[-1] % r))
        x = F.dropout(x, self.dropout, self.training)
        added = x.unflatten(-1, (-1, r)).sum(-2) @ block  # [..., out or mini_r]
        if added.shape[-1] < y.shape[-1]:
            added = added.repeat(*[1] * (x.ndim - 1), y.shape[-1] // added.shape[-1])
        return y + added.to(y.dtype)

    def delta_weight(self, base: nn.Module) -> Tensor:
        out_features, in_features = features(base)
        block = self.miss_block
        if block.ndim == 2:
            r, outputs = block.shape
            return block.T.repeat(out_features // outputs, -(-in_features // r))[:, :in_features]
        r = block.shape[-1]
        blocks = weight_of(base).to(block.dtype).reshape(-1, r, in_features // r, r).transpose(1, 2)  # [i, j, r, r]
        return ((blocks @ block[:, None]) + block[:, None]).transpose(1, 2).reshape(out_features, in_features)


def _unfit(path: str, base: nn.Module, what: str, remedy: str) -> AdapterError:
    out_features, in_features = features(base)
    message = f"{path} is {out_features} x {in_features}: {what}."
    return AdapterError("Shards do not fit", message, f"Set {remedy}, or leave the layer out.")
