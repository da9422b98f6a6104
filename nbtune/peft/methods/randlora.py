"""RandLoRA: full-rank updates from random bases. Albert et al. 2025, arXiv:2502.00987.

    W' = W + s sum_n B_n diag(l_n) A diag(g_n)        n = 1 ... ceil(min(in, out) / r); s = alpha / r

B_n [out, r] and A [r, in] are random and shared by all layers; l_n [r] and g_n [in] are trained. This is for in <= out;
otherwise A is on the side of the output, so that what is trained is always as long as the shorter side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Self

from torch import Tensor, nn
from torch.nn import functional as F

from nbtune.kernels.random_bases import random_bases
from nbtune.modules.base import empty, features, zeros
from nbtune.peft.configs.shared import RandLoraConfig
from nbtune.peft.layer import Adapter, Shared


class Bases(Shared):
    """A [r, 1, shorter] and B [longer, bases, r] for the largest layer, made from the seed on the CPU.

    They are in bfloat16 (the sparse ones in fp32). PEFT makes the same numbers where there is bfloat16, and others in
    fp16 on old GPUs; those in a file are taken as they are.
    """

    randlora_A: Tensor
    randlora_B: Tensor

    def __init__(self, config: RandLoraConfig, bases: Mapping[str, nn.Module]) -> None:
        super().__init__()
        sizes = [features(base) for base in bases.values()]
        shorter, longer = sorted(max(side) for side in zip(*sizes, strict=True))
        zeros_per_one = math.sqrt(shorter) if config.very_sparse else 3 if config.sparse else 0
        A, B = random_bases(config.r, shorter, longer, config.projection_prng_key, zeros_per_one)
        device = empty(next(iter(bases.values()))).device
        self.register_buffer("randlora_A", A.to(device), persistent=config.save_projection)
        self.register_buffer("randlora_B", B.to(device), persistent=config.save_projection)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the bases in the file's precision: others than ours would lose digits in bfloat16."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.to(self.randlora_A.device, copy=True))


class RandLora(Adapter):
    """The trained diagonals, and the bases that all layers share."""

    # PEFT repeats the bases for every layer.
    repeated: ClassVar[tuple[str, ...]] = ("randlora_A", "randlora_B")

    def __init__(self, randlora_lambda: Tensor, randlora_gamma: Tensor, shared: Bases, config: RandLoraConfig) -> None:
        super().__init__()
        self.randlora_lambda = nn.Parameter(randlora_lambda)  # [r, bases]
        self.randlora_gamma = nn.Parameter(randlora_gamma)  # [bases, shorter]
        self.shared = shared
        self.scaling = config.randlora_alpha / config.r
        self.dropout = config.randlora_dropout

    @classmethod
    def share(cls, config: RandLoraConfig, bases: Mapping[str, nn.Module]) -> Bases:
        return Bases(config, bases)

    @classmethod
    def create(cls, base: nn.Module, config: RandLoraConfig, path: str, shared: Bases) -> Self:
        shorter, longer = sorted(features(base))
        count = math.ceil(shorter / config.r)
        gamma = empty(base, count, shorter)
        if config.init_weights:
            return cls(zeros(base, config.r, count), gamma.fill_(1 / max(count, shorter)), shared, config)
        return cls(empty(base, config.r, count).normal_(), gamma.fill_(1 / longer), shared, config)

    def _factors(self, out: int, inner: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Down [rank, in], the diagonal between [rank] and up [out, rank], rank = r times the number of bases."""
        gamma = self.randlora_gamma.to(like)
        shorter, count = gamma.shape[1], gamma.shape[0]
        # As in PEFT A's rows are numbered rank first, B's columns basis first: what is random may meet in any order.
        A = (self.shared.randlora_A[:, :, :shorter].to(like) * gamma).flatten(0, 1)
        B = self.shared.randlora_B[: max(out, inner), :count].to(like).flatten(1)
        diagonal = self.scaling * self.randlora_lambda.flatten().to(like)
        return (A, diagonal, B) if inner == shorter else (B.t(), diagonal, A.t())

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        # The diagonal scales the hidden values: scaling A instead would keep a second matrix of A's size for backward.
        down, diagonal, up = self._factors(y.shape[-1], x.shape[-1], x)
        return y + F.linear(F.linear(x, down) * diagonal, up).to(y.dtype)

    def delta_weight(self, base: nn.Module) -> Tensor:
        down, diagonal, up = self._factors(*features(base), self.randlora_lambda)
        return (up * diagonal) @ down
