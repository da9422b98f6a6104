"""VeRA: vector-based random matrix adaptation. Kopiczko et al. 2023, arXiv:2310.11454.

    y = W x + b * (B (d * (A x)))        b [out] and d [r] are trained; * by element

A [r, in] and B [out, r] are random and shared by all layers, each of which takes the first columns of A and the first
rows of B, as many as it has inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nbtune.modules.base import empty, features, ones, zeros
from nbtune.peft.configs.shared import VeraConfig
from nbtune.peft.layer import Adapter, Shared


class Projections(Shared):
    """A [r, largest in] and B [largest out, r], made from the seed on the CPU: the same on every machine."""

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, config: VeraConfig, bases: Mapping[str, nn.Module]) -> None:
        super().__init__()
        sizes = [features(base) for base in bases.values()]
        largest_out, largest_in = (max(side) for side in zip(*sizes, strict=True))
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        first = next(iter(bases.values()))
        for name, shape in (("vera_A", (config.r, largest_in)), ("vera_B", (largest_out, config.r))):
            matrix = torch.empty(shape, dtype=torch.float32, device="cpu")
            nn.init.kaiming_uniform_(matrix, generator=generator)
            self.register_buffer(name, matrix.to(empty(first)), persistent=config.save_projection)


class Vera(Adapter):
    """Two trained vectors, and the projections that all layers share."""

    def __init__(self, vera_lambda_b: Tensor, vera_lambda_d: Tensor, shared: Projections, dropout: float) -> None:
        super().__init__()
        self.vera_lambda_b = nn.Parameter(vera_lambda_b)  # [out]
        self.vera_lambda_d = nn.Parameter(vera_lambda_d)  # [r]
        self.shared = shared
        self.dropout = dropout

    @classmethod
    def share(cls, config: VeraConfig, bases: Mapping[str, nn.Module]) -> Projections:
        return Projections(config, bases)

    @classmethod
    def create(cls, base: nn.Module, config: VeraConfig, path: str, shared: Projections) -> Self:
        out, r = features(base)[0], config.r
        if config.init_weights:
            return cls(zeros(base, out), empty(base, r).fill_(config.d_initial), shared, config.vera_dropout)
        return cls(ones(base, out), empty(base, r).normal_(), shared, config.vera_dropout)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        A, B = self.shared.vera_A[:, : x.shape[-1]], self.shared.vera_B[: y.shape[-1]]
        x = F.dropout(x, self.dropout, self.training)
        hidden = F.linear(x, A.to(x)) * self.vera_lambda_d.to(x.dtype)
        return y + (F.linear(hidden, B.to(x)) * self.vera_lambda_b.to(x.dtype)).to(y.dtype)

    def delta_weight(self, base: nn.Module) -> Tensor:
        out, inner = features(base)
        A, B = (matrix.to(self.vera_lambda_b) for matrix in (self.shared.vera_A[:, :inner], self.shared.vera_B[:out]))
        return (self.vera_lambda_b[:, None] * B) @ (self.vera_lambda_d[:, None] * A)
