"""WaveFT: Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets. Bilican et al. 2025, arXiv:2505.12532.

    W' = W + s S_out C S_in^T        C [P_out, P_in]: n trained wavelet coefficients at random places
    (S c)[2 j + p] = sum over b, i of c[b, j + i] f_b[L - 2 - 2 i + p]        f_0, f_1: L low and high taps

S joins the low and the high half of c to a signal; it is one step of the inverse transform, with P = size + L - 2, made
even. Like FourierFT, the places are drawn again from the seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nbtune.modules.base import empty, features, zeros
from nbtune.peft.configs.waveft import WaveFTConfig
from nbtune.peft.layer import Shared
from nbtune.peft.methods.sparse import SparseAdapter, check_count, random_places
from nbtune.peft.targets import of_pattern

# Which roots of a symlet lie outside the unit circle, in the order of their distance from it; by the symlet's number.
_SYMLETS = {2: "0", 3: "0", 4: "01", 5: "10", 6: "101", 7: "100", 8: "0101", 9: "0110", 10: "10101"}
# Over sqrt(2). The last is as PEFT has it, since its files mean it: the true coif4 has other values.
_COIFLETS = {
    "coif1": "-.0514297284708 .238929728471 .602859456942 .272140543058 -.0514297284708 -.0110702715292",
    "coif2": "0.0115875967387 -.0293201379835 -.047639590311 .273021046535 .574682393857 .294867193696 "
    "-.0540856070917 -.0420264804608 .0167444101633 .00396788361296 -.00128920335614 -.000509505399108",
    "coif3": "-.00268241867092 .00550312670783 .0165835604792 -.0465077644787 -.0432207635602 .286503335274 "
    ".56128525687 .302983571773 -.0507701407549 -.0581962507616 .0244340943212 .011229240962 -.00636960101105 "
    "-.00182045891557 .000790205100958 .000329665173793 -5.01927745533e-5 -2.44657342553e-5",
    "coif4": ".000630961211431 -.00115222514377 -.00519452516347 .0113609308998 .0189450610456 -.0517198437058 "
    "-.0344861404709 .302272510537 .554547906241 .307917668025 -.0435250092813 -.0648879509714 .0198807736482 "
    ".0176389478713 -.00736605484717 -.00231243230766 .00142600634423 .000466698463554 -.000127000784239 "
    "-.000113053636979 3.04836487968e-5 1.26674480893e-5 -1.58492658076e-6 -1.12394808828e-6",
}


class Counts(Shared):
    """How many coefficients each layer gets, by path, where all are shared out by size."""

    def __init__(self, counts: dict[str, int]) -> None:
        super().__init__()
        self.counts = counts


class WaveFT(SparseAdapter):
    file_names: ClassVar[dict[str, str]] = {"values": "waveft_spectrum"}
    taps: Tensor  # [band, L / 2, phase]

    def __init__(self, values: Tensor, places: Tensor, sizes: tuple[int, int], scaling: float, wavelet: str) -> None:
        super().__init__(values, places, sizes, scaling)
        self.wavelet = wavelet  # or nothing, where the values are entries of the weight
        low = scaling_filter(wavelet) if wavelet else np.ones(2)
        high = low[::-1] * (-1.0) ** np.arange(len(low))
        taps = torch.tensor(np.stack([low, high]), dtype=values.dtype, device=values.device)
        self.register_buffer("taps", taps.reshape(2, -1, 2), persistent=False)

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
        places, wavelet = random_places(base, count, config.random_loc_seed), ""
        if config.use_idwt:
            wavelet, margin = config.wavelet_family, len(scaling_filter(config.wavelet_family)) - 2
            padded = sizes[0] + margin + sizes[0] % 2, sizes[1] + margin + sizes[1] % 2
            places, sizes = _in_bands(places, sizes, padded), padded
        return cls(values, places, sizes, config.scaling, wavelet)

    def to_output(self, c: Tensor, size: int) -> Tensor:
        if not self.wavelet:
            return c
        windows = c.unflatten(-1, (2, -1)).unfold(-1, self.taps.shape[-2], 1)  # [..., band, size / 2, L / 2]
        return torch.einsum("...bjt,btp->...jp", windows, self.taps.to(c.dtype).flip(-2)).flatten(-2)[..., :size]

    def from_input(self, x: Tensor) -> Tensor:
        if not self.wavelet:
            return x
        phases = F.pad(x, (0, x.shape[-1] % 2)).unflatten(-1, (-1, 2)).mT
        margin = self.taps.shape[-2] - 1
        windows = F.pad(phases, (margin, margin)).unfold(-1, margin + 1, 1)  # [..., phase, P / 2, L / 2]
        return torch.einsum("...pkt,btp->...bk", windows, self.taps.to(x.dtype)).flatten(-2)


def _in_bands(places: Tensor, sizes: tuple[int, int], padded: tuple[int, int]) -> Tensor:
    """The places [2, n] in the middle of the larger matrix, as PEFT has them.

    PEFT filters the upper right quarter of C along its columns, and the lower left along its rows: they change places.
    """
    size, half = (torch.tensor(pair, device=places.device)[:, None] for pair in (padded, [n // 2 for n in padded]))
    moved = (
        places + torch.tensor([(p - n) // 2 for p, n in zip(padded, sizes, strict=True)], device=places.device)[:, None]
    )
    second = moved >= half  # [2, n]
    return torch.where(second[0] == second[1], moved, (moved + half) % size)


def scaling_filter(wavelet: str) -> np.ndarray:
    """The low taps [L] of a wavelet's synthesis, in fp64; those of Daubechies by spectral factorisation."""
    if wavelet in _COIFLETS:
        return math.sqrt(2) * np.array(_COIFLETS[wavelet].split(), dtype=float)
    n = int(wavelet.lstrip("dbsym"))
    y = 1 - 2 * np.roots([math.comb(n - 1 + k, k) for k in reversed(range(n))]) + 0j
    roots = y + np.sqrt(y * y - 1)
    roots = np.where(abs(roots) < 1, roots, 1 / roots)
    if wavelet.startswith("sym"):
        pairs = sorted((root for root in roots if root.imag > -1e-9), key=abs)
        pairs = [1 / root if out == "1" else root for root, out in zip(pairs, _SYMLETS[n], strict=True)]
        roots = [each for root in pairs for each in ([root] if abs(root.imag) < 1e-9 else [root, root.conjugate()])]
    taps = np.poly([*[-1] * n, *roots]).real
    return taps * math.sqrt(2) / taps.sum()
