"""The random matrices of RandLoRA."""

from __future__ import annotations

import pytest
import torch

from nbtune.kernels.random_bases import random_bases, ternary


@pytest.mark.parametrize("zeros_per_one", [0, 3])
def test_shapes_spread_and_seeds(zeros_per_one):
    A, B = random_bases(8, 60, 70, 1, zeros_per_one)
    assert A.shape == (8, 1, 60)
    assert B.shape == (70, 8, 8)
    for matrix, again, other in zip(
        (A, B), random_bases(8, 60, 70, 1, zeros_per_one), random_bases(8, 60, 70, 2, zeros_per_one), strict=True
    ):
        assert matrix.float().std().item() == pytest.approx(1, abs=0.01)
        assert torch.equal(matrix, again)
        assert not torch.equal(matrix, other)
        assert (matrix.dtype is torch.bfloat16) == (zeros_per_one == 0)
        assert len(matrix.unique()) == 3 or not zeros_per_one


@pytest.mark.parametrize("zeros_per_one", [3, 16.0])
def test_ones_are_as_rare_as_asked(zeros_per_one):
    matrix = ternary((300, 400), zeros_per_one, torch.Generator().manual_seed(0))
    for value in (-1, 1):
        assert (matrix == value).float().mean().item() == pytest.approx(1 / (2 * zeros_per_one), rel=0.05)
