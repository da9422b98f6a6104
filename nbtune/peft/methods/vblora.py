"""VB-LoRA: low-rank updates from a bank of vectors. Li et al. 2024, arXiv:2405.15179.

    y = W x + B A x        A [r, in], B [out, r]

Each stretch of `vector_length` elements of a row of A and of a column of B is a mixture of k vectors of one bank that
all layers share: those with the k largest logits, weighted by the softmax of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nbtune.errors import AdapterError
from nbtune.modules.base import empty, features
from nbtune.peft.configs.shared import VBLoRAConfig
from nbtune.peft.layer import Adapter, Shared

_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"


class VectorBank(Shared):
    """The vectors [num_vectors, vector_length]; they are trained."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vblora_vector_bank = nn.Parameter(vectors)


class VBLoRA(Adapter):
    """The logits of one layer, and the bank that all layers share."""

    def __init__(self, logits_A: Tensor, logits_B: Tensor, shared: VectorBank, config: VBLoRAConfig) -> None:
        super().__init__()
        self.vblora_logits_A = nn.Parameter(logits_A)  # [r, in / length, vectors]
        self.vblora_logits_B = nn.Parameter(logits_B)  # [out / length, r, vectors]
        self.shared = shared
        self.topk = config.topk
        self.dropout = config.vblora_dropout
        self.small_file = config.save_only_topk_weights
        self.chosen = False  # whether the logits come from a small file and only say which vectors were chosen

    @classmethod
    def share(cls, config: VBLoRAConfig, bases: Mapping[str, nn.Module]) -> VectorBank:
        common = math.gcd(*(size for base in bases.values() for size in features(base)))
        for path, base in bases.items():
            if any(size % config.vector_length for size in features(base)):
                out, inner = features(base)
                message = f"{path} has {inner} inputs and {out} outputs; vector_length is {config.vector_length}."
                remedy = f"Set vector_length to {common} or another divisor of it: it divides the sizes of all layers."
                raise AdapterError("vector_length does not fit", message, remedy)
        first = next(iter(bases.values()))
        bound = config.init_vector_bank_bound
        return VectorBank(empty(first, config.num_vectors, config.vector_length).uniform_(-bound, bound))

    @classmethod
    def create(cls, base: nn.Module, config: VBLoRAConfig, path: str, shared: VectorBank) -> Self:
        out, inner = (size // config.vector_length for size in features(base))
        logits_A = empty(base, config.r, inner, config.num_vectors).normal_(std=config.init_logits_std)
        logits_B = empty(base, out, config.r, config.num_vectors).normal_(std=config.init_logits_std)
        return cls(logits_A, logits_B, shared, config)

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r]."""
        if self.chosen and torch.is_grad_enabled() and self.vblora_logits_A.requires_grad:
            message = "It was loaded from a file with save_only_topk_weights, which holds no logits to train."
            raise AdapterError("This adapter can only serve", message, "Train the one that it was saved from.")
        return self._mixed(self.vblora_logits_A).flatten(1), self._mixed(self.vblora_logits_B).mT.flatten(0, 1)

    def _mixed(self, logits: Tensor) -> Tensor:
        """The mixtures [..., vector_length] of the bank's vectors for logits [..., vectors]."""
        largest, which = logits.topk(self.topk)
        vectors = self.shared.vblora_vector_bank.to(logits.device)[which]  # [..., k, vector_length]
        return (largest.softmax(-1)[..., None] * vectors).sum(-2)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        A, B = self._matrices()
        x = F.dropout(x, self.dropout, self.training)
        return y + F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)).to(y.dtype)

    def delta_weight(self, base: nn.Module) -> Tensor:
        A, B = self._matrices()
        return B @ A

    def saved(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The logits; in a small file the numbers of the k vectors and their weights but the last: they sum to 1."""
        if not self.small_file:
            return dict(state)
        saved = {}
        for name, logits in state.items():
            largest, which = logits.topk(self.topk)
            saved[name + _INDICES] = which.to(_index_type(logits.shape[-1]))
            saved[name + _WEIGHTS] = largest.softmax(-1)[..., :-1]
        return saved

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the logits, or make some that give the weights of a small file."""
        for name, logits in self.own_state().items():
            if name in tensors:
                logits.copy_(tensors[name])
            elif name + _INDICES in tensors and name + _WEIGHTS in tensors:
                weights = tensors[name + _WEIGHTS].to(logits)
                last = (1 - weights.sum(-1, keepdim=True)).clamp_min(0)  # rounding must not make it negative
                which = tensors[name + _INDICES].to(logits.device, torch.long)
                logits.fill_(-math.inf).scatter_(-1, which, torch.cat([weights, last], -1).log())
                self.chosen = True


def _index_type(count: int) -> torch.dtype:
    """PEFT's, the smallest of these that can number `count` vectors."""
    return torch.uint8 if count < 2**8 else torch.int16 if count < 2**15 else torch.int32
