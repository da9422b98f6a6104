"""HiRA: Parameter-Efficient Hadamard High-Rank Adaptation. Huang et al., ICLR 2025 (openreview.net, TwJrTz9cRS).

    y = W x + (W * B A) x        * is element-wise; W [out, in], A [r, in], B [out, r]

The update has up to the rank of W times r. Of a convolution A is [r, in, *kernel] and B [out, r, *1]; of an embedding
A is [r, vocabulary] and B [dim, r].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.nn import functional as F

from nbtune.modules.base import CONVOLUTIONS, LINEARS, apply_weight, empty, features, refuse_groups, weight_of
from nbtune.modules.paths import of_pattern
from nbtune.peft.configs.low_rank import HiraConfig
from nbtune.peft.layer import Adapter


class Hira(Adapter):
    """One low-rank factor of the weight."""

    bases: ClassVar[tuple[type[nn.Module], ...]] = (*LINEARS, *CONVOLUTIONS, nn.Embedding)

    def __init__(self, base: nn.Module, hira_A: Tensor, hira_B: Tensor, dropout: float) -> None:
        super().__init__()
        self.hira_A = nn.Parameter(hira_A)
        self.hira_B = nn.Parameter(hira_B)
        self.dropout = dropout
        self.of_embedding = isinstance(base, nn.Embedding)

    @classmethod
    def create(cls, base: Any, config: HiraConfig, path: str, shared: None) -> Self:
        refuse_groups(base, path)
        r = of_pattern(config.rank_pattern, path, config.r)
        kernel: tuple[int, ...] = base.kernel_size if isinstance(base, CONVOLUTIONS) else ()
        out_features, in_features = features(base)
        A = empty(base, r, in_features, *kernel).normal_()
        B = empty(base, out_features, r, *[1] * len(kernel)).normal_()
        if config.init_weights and isinstance(base, nn.Embedding):
            A.zero_()
        elif config.init_weights:
            gaussian = config.init_weights == "gaussian" and not kernel
            A = A.normal_(std=1 / r) if gaussian else nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            B.zero_()
        return cls(base, A, B, config.hira_dropout)

    def saved(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = {"hira_A": "hira_embedding_A", "hira_B": "hira_embedding_B"} if self.of_embedding else {}
        return {names.get(name, name): tensor for name, tensor in state.items()}

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        if self.of_embedding:  # only the rows that are looked up
            return y + (base(x) * (F.embedding(x, self.hira_A.mT) @ self.hira_B.mT)).to(y.dtype)
        return y + apply_weight(base, F.dropout(x, self.dropout, self.training), self.delta_weight(base))

    def delta_weight(self, base: nn.Module) -> Tensor:
        """Return W * B A."""
        factor = self.hira_B.flatten(1) @ self.hira_A.flatten(1)
        weight = weight_of(base)
        return weight * (factor.mT if self.of_embedding else factor).view_as(weight)
