"""FourierFT: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform. Gao et al. 2024, arXiv:2405.03003.

    W' = W + s Re(F^-1(C))        C [out, in]: n trained entries at random places, F^-1 the inverse transform in 2D

The places are drawn again from the seed and are not in the file.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from nbtune.kernels.sparse import random_places
from nbtune.modules.base import empty, features, zeros
from nbtune.modules.paths import of_pattern
from nbtune.peft.configs.sparse import FourierFTConfig
from nbtune.peft.methods.sparse import SparseAdapter, check_count


class FourierFT(SparseAdapter):
    file_names: ClassVar[dict[str, str]] = {"values": "fourierft_spectrum"}

    @classmethod
    def create(cls, base: nn.Module, config: FourierFTConfig, path: str, shared: None) -> Self:
        count = of_pattern(config.n_frequency_pattern, path, config.n_frequency)
        sizes = features(base)
        check_count(count, base, path, "n_frequency", sizes[0] * sizes[1])
        values = zeros(base, count) if config.init_weights else empty(base, count).normal_()
        return cls(values, random_places(sizes, count, config.random_loc_seed, values.device), sizes, config.scaling)

    def to_output(self, c: Tensor, size: int) -> Tensor:
        return torch.fft.ifft(c)

    def from_input(self, x: Tensor) -> Tensor:
        return torch.fft.ifft(x)  # the transform's matrix is symmetric
