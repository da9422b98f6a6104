"""OFT: Controlling Text-to-Image Diffusion by Orthogonal Finetuning. Qiu et al. 2023, arXiv:2306.07280.

    y = W (R^T x)        W [out, in]; R [in, in] has rotations [b, b] on its diagonal, one for each block of b inputs

R comes from a skew-symmetric Q, of which the b (b - 1) / 2 entries above the diagonal are trained: by the Cayley
transform (I - Q)(I + Q)^-1, or by the series I + 2 Q + 2 Q^2 + ... for (I + Q)(I - Q)^-1, which needs no inverse.
Rotating the input is OFTv2, Qiu et al. 2025, arXiv:2506.19847. The rows of an embedding are rotated: W R.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from nbtune.kernels.rotations import cayley, cayley_series, dropped_blocks, rotated_blocks, skew_symmetric
from nbtune.modules.base import CONVOLUTIONS, LINEARS, features, zeros
from nbtune.peft.configs.rotations import OFTConfig
from nbtune.peft.methods.rotation import Rotation, inputs, nearest_divisor


class OFT(Rotation):
    """Block-wise rotations. PEFT never applies module_dropout; here it does what its name says."""

    bases: ClassVar[tuple[type[nn.Module], ...]] = (*LINEARS, *CONVOLUTIONS, nn.Embedding)

    def __init__(self, base: nn.Module, oft_R: Tensor, width: int, size: int, config: OFTConfig) -> None:
        super().__init__(base)
        self.oft_R = nn.Parameter(oft_R)  # [in / b, b (b - 1) / 2], or [1, ...] where the blocks share one rotation
        self.of_embedding = isinstance(base, nn.Embedding)
        self.width, self.size = width, size  # in, b
        self.terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else 0
        self.eps = config.eps if config.coft else 0.0
        self.dropout = config.module_dropout

    @classmethod
    def create(cls, base: nn.Module, config: OFTConfig, path: str, shared: None) -> Self:
        width = features(base)[0] if isinstance(base, nn.Embedding) else inputs(base, path)
        name = "r" if config.r else "oft_block_size"
        wanted = config.r or config.oft_block_size
        fitting = nearest_divisor(width, wanted)
        if fitting != wanted:  # as PEFT does, whose files hold these shapes
            module = path.rpartition(".")[2]  # not the whole path: one warning for all blocks of the model
            warnings.warn(
                f"{name}={wanted} does not divide the {width} inputs of {module}: {fitting} is used.", stacklevel=2
            )
        size = width // fitting if config.r else fitting
        oft_R = zeros(base, 1 if config.block_share else width // size, size * (size - 1) // 2)
        if not config.init_weights:
            nn.init.normal_(oft_R, std=0.1)
        return cls(base, oft_R, width, size, config)

    def saved(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        name = "oft_embedding_R.weight" if self.of_embedding else "oft_R.weight"
        return {name: state["oft_R"]}

    def turned(self, x: Tensor, *, transposed: bool = False, drop: bool = False) -> Tensor:
        Q = skew_symmetric(self._constrained(), self.size)
        blocks = cayley_series(Q, self.terms) if self.terms else cayley(Q)  # [in / b or 1, b, b]
        if drop and self.dropout and len(blocks) > 1:
            blocks = dropped_blocks(blocks[None], self.dropout)[0]
        blocks = blocks.mT if transposed else blocks
        return rotated_blocks(x, blocks.expand(self.width // self.size, -1, -1))

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return self.turned(y, drop=self.training) if self.of_embedding else super().forward(x, y, base)

    def turned_weight(self, weight: Tensor, *, drop: bool = False) -> Tensor:
        """Return W R^T, or W R of an embedding."""
        return self.turned(weight, drop=drop) if self.of_embedding else super().turned_weight(weight, drop=drop)

    def _constrained(self) -> Tensor:
        """The entries above the diagonal of Q; of COFT with |Q| at most eps / sqrt(blocks), which training keeps to."""
        entries = self.oft_R
        if not self.eps:
            return entries
        with torch.no_grad():
            norm = math.sqrt(2) * entries.norm(dim=1, keepdim=True)  # of Q, which has each entry twice
            inside = entries * (self.eps / math.sqrt(len(entries)) / norm).clamp(max=1)
            if self.training:
                entries.copy_(inside)
        return entries + (inside - entries).detach()
