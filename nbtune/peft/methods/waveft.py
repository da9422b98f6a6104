"""WaveFT: Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets. Bilican et al. 2025, arXiv:2505.12532.

    W' = W + s S_out C S_in^T        C [P_out, P_in]: n trained wavelet coefficients at random places

S is one step of the inverse wavelet transform (kernels/wavelets.py). Like FourierFT's, the places are drawn again from
the seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Self

from torch import Tensor, nn

from nbtune.kernels.sparse import random_places
from nbtune.kernels.wavelets import coefficient_count, inverse_step, places_in_bands, synthesis_taps, transposed_step
from nbtune.modules.base import empty, features, zeros
from nbtune.modules.paths import of_pattern
from nbtune.peft.configs.sparse import WaveFTConfig
from nbtune.peft.layer import Shared
from nbtune.peft.methods.sparse import SparseAdapter, check_count


class Counts(Shared):
    """How many coefficients each layer gets, by path, where all are shared out by size."""

    def __init__(self, counts: dict[str, int]) -> None:
        super().__init__()
        self.counts = counts


class WaveFT(SparseAdapter):
    file_names: ClassVar[dict[str, str]] = {"values": "waveft_spectrum"}
    taps: Tensor

    def __init__(self, values: Tensor, places: Tensor, sizes: tuple[int, int], scaling: float, wavelet: str) -> None:
        super().__init__(values, places, sizes, scaling)
        self.wavelet = wavelet  # or nothing, where the values are entries of the weight
        self.register_buffer("taps", synthesis_taps(wavelet).to(values) if wavelet else None, persistent=False)

    @classmethod
    def share(cls, config: WaveFTConfig, bases: Mapping[str, nn.Module]) -> Counts | None:
        if not config.proportional_parameters:
            return None
        entries = {path: math.prod(features(base)) for path, base in bases.items()}
        each = config.n_frequency * len(bases) / sum(entries.values())
        return Counts({path: max(1, round(each * size)) for path, size in entries.items()})

    @classmethod
    def create(cls, base: nn.Module, config: WaveFTConfig, path: str, shared: Counts | None) -> Self:
        count = shared.counts[path] if shared else of_pattern(config.n_frequency_pattern, path, config.n_frequency)
        sizes = features(base)
        check_count(count, base, path, "n_frequency", sizes[0] * sizes[1])
        values = zeros(base, count) if config.init_weights else empty(base, count).normal_(std=0.01)
        places = random_places(sizes, count, config.random_loc_seed, values.device)
        if not config.use_idwt:
            return cls(values, places, sizes, config.scaling, "")
        taps = synthesis_taps(config.wavelet_family)
        padded = coefficient_count(sizes[0], taps), coefficient_count(sizes[1], taps)
        return cls(values, places_in_bands(places, sizes, padded), padded, config.scaling, config.wavelet_family)

    def to_output(self, c: Tensor, size: int) -> Tensor:
        return inverse_step(c, self.taps, size) if self.wavelet else c

    def from_input(self, x: Tensor) -> Tensor:
        return transposed_step(x, self.taps) if self.wavelet else x
