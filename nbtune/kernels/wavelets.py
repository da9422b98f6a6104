"""One step of the inverse wavelet transform S, its transpose, and the filters of wavelets.

    (S c)[2 j + p] = sum over b, i of c[b, j + i] f_b[L - 2 - 2 i + p]        f_0, f_1: L low and high taps

S joins the low and the high half of the coefficients c [P] to a signal, P = size + L - 2, made even.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

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


def inverse_step(c: Tensor, taps: Tensor, size: int) -> Tensor:
    """The signals [..., size] of coefficients [..., P], with the taps of `synthesis_taps`."""
    windows = c.unflatten(-1, (2, -1)).unfold(-1, taps.shape[-2], 1)  # [..., band, size / 2, L / 2]
    return torch.einsum("...bjt,btp->...jp", windows, taps.to(c.dtype).flip(-2)).flatten(-2)[..., :size]


def transposed_step(x: Tensor, taps: Tensor) -> Tensor:
    """S^T x [..., P] for x [..., size]."""
    phases = F.pad(x, (0, x.shape[-1] % 2)).unflatten(-1, (-1, 2)).mT
    margin = taps.shape[-2] - 1
    windows = F.pad(phases, (margin, margin)).unfold(-1, margin + 1, 1)  # [..., phase, P / 2, L / 2]
    return torch.einsum("...pkt,btp->...bk", windows, taps.to(x.dtype)).flatten(-2)


def coefficient_count(size: int, taps: Tensor) -> int:
    """P, the number of coefficients of a signal of this size."""
    return size + size % 2 + taps[0].numel() - 2


def places_in_bands(places: Tensor, sizes: tuple[int, int], padded: tuple[int, int]) -> Tensor:
    """Places [2, n] in a matrix of these sizes as places in the middle of one of coefficients, as PEFT has them.

    PEFT filters the upper right quarter of C along its columns, and the lower left along its rows: they change places.
    """
    inner, outer = (torch.tensor(pair, device=places.device)[:, None] for pair in (sizes, padded))
    moved = places + (outer - inner) // 2
    second = moved >= outer // 2  # [2, n]
    return torch.where(second[0] == second[1], moved, (moved + outer // 2) % outer)


def synthesis_taps(wavelet: str) -> Tensor:
    """The filters f_0 and f_1 of a wavelet as [band, L / 2, phase], in fp64."""
    low = scaling_filter(wavelet)
    high = low[::-1] * (-1.0) ** np.arange(len(low))
    return torch.from_numpy(np.stack([low, high])).view(2, -1, 2)


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
