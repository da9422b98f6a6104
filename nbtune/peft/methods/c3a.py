"""C3A: Parameter-Efficient Fine-Tuning via Circular Convolution. Chen et al. 2024, arXiv:2407.19342.

W' = W + D / in        D [out, in]: circulant blocks, D_mn[i, j] = k_mn[(j - i) mod b]
D_mn x_n = F^-1(F(x_n) * conj(F(k_mn)))        k [out / b, in / b, b], F the Fourier transform of length b
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn

from nbtune.kernels.structured import circulant, circulant_product
from nbtune.modules.base import empty, features, require_divisor
from nbtune.modules.paths import of_pattern
from nbtune.peft.configs.sparse import C3AConfig
from nbtune.peft.layer import Adapter


class C3A(Adapter):
    """One kernel for each block. In fp32 at least, as there is no FFT in 16 bits."""

    def __init__(self, c3a_kernel: Tensor) -> None:
        super().__init__()
        self.c3a_kernel = nn.Parameter(c3a_kernel)

    @classmethod
    def create(cls, base: nn.Module, config: C3AConfig, path: str, shared: None) -> Self:
        out_features, in_features = features(base)
        size = of_pattern(config.block_size_pattern, path, config.block_size)
        require_divisor(base, path, "block_size", size)
        kernel = empty(base, out_features // size, in_features // size, size)
        match config.init_weights:
            case True:
                kernel.zero_()
            case "gaussian":
                kernel.normal_()
            case "kaiming_uniform":
                kernel.uniform_(-1, 1).mul_(math.sqrt(1 / in_features))
            case _:
                kernel.uniform_(-1, 1).mul_(math.sqrt(6 / (in_features + out_features)))
        return cls(kernel)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        kernel = self._kernel()
        return y + circulant_product(x.to(kernel.dtype), kernel).to(y.dtype) / x.shape[-1]

    def delta_weight(self, base: nn.Module) -> Tensor:
        return circulant(self._kernel()) / features(base)[1]

    def _kernel(self) -> Tensor:
        return self.c3a_kernel.to(torch.promote_types(self.c3a_kernel.dtype, torch.float32))
