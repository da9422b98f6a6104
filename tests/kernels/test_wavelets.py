"""The filters of wavelets, and one step of the inverse transform, in fp64."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.waveft.wavelet import Wavelet

from nbtune.kernels.wavelets import coefficient_count, inverse_step, scaling_filter, synthesis_taps, transposed_step
from nbtune.peft.configs.sparse import WAVELETS


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_the_filters_are_those_of_peft(wavelet):
    low, high = synthesis_taps(wavelet).flatten(1)
    for mine, theirs in ((low, Wavelet(wavelet).rec_lo), (high, Wavelet(wavelet).rec_hi)):
        torch.testing.assert_close(mine, torch.tensor(theirs, dtype=torch.float64), atol=1e-11, rtol=0)


@pytest.mark.parametrize("wavelet", [name for name in WAVELETS if name != "coif4"])
def test_the_filters_are_orthonormal(wavelet):
    taps = torch.tensor(scaling_filter(wavelet))
    for shift in range(0, len(taps), 2):
        assert abs((taps[shift:] @ taps[: len(taps) - shift]).item() - (shift == 0)) < 1e-10


@pytest.mark.parametrize("size", [12, 13])
@pytest.mark.parametrize("wavelet", ["db1", "db3", "sym5", "coif2"])
def test_the_step_is_the_sum_of_its_equation_and_its_transpose_goes_back(wavelet, size):
    taps = synthesis_taps(wavelet)
    low, high = taps.flatten(1)
    count, length = coefficient_count(size, taps), len(low)
    assert count == size + size % 2 + length - 2
    S = inverse_step(torch.eye(count, dtype=torch.float64), taps, size).T  # [size, P]
    expected = torch.zeros_like(S)
    for at in range(size):
        j, p = divmod(at, 2)
        for band, f in enumerate((low, high)):
            for i in range(length // 2):
                expected[at, band * count // 2 + j + i] += f[length - 2 - 2 * i + p]
    torch.testing.assert_close(S, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(transposed_step(torch.eye(size, dtype=torch.float64), taps), S, atol=1e-12, rtol=0)
    torch.testing.assert_close(S @ S.T, torch.eye(size, dtype=torch.float64), atol=1e-10, rtol=0)
