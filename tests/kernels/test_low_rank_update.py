"""Low-rank updates, of a batch and of each row, and the norms of updated weights, against dense products in fp64."""

from __future__ import annotations

import pytest
import torch

from nbtune.kernels.low_rank_update import add_low_rank, add_low_rank_by_row, row_norms

OUT, IN = 7, 5


def factors(*ranks):
    all_A = [torch.randn(r, IN, dtype=torch.float64, requires_grad=True) for r in ranks]
    return all_A, [torch.randn(OUT, r, dtype=torch.float64, requires_grad=True) for r in ranks]


def same(result, expected, leaves):
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=0)
    to = torch.randn_like(expected)
    found, right = (torch.autograd.grad((y * to).sum(), leaves) for y in (result, expected))
    for mine, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 2), ()])
def test_the_update_of_a_batch(shape):
    (A,), (B,) = factors(3)
    x, y = (torch.randn(*shape, size, dtype=torch.float64, requires_grad=True) for size in (IN, OUT))
    same(add_low_rank(y, x, A, B, 0.5), y + 0.5 * x @ A.T @ B.T, (x, y, A, B))


@pytest.mark.parametrize("which", [None, [2, 0, 0, 1, 2]])
@pytest.mark.parametrize("ranks", [(3, 3, 3), (1, 4, 2)])
@pytest.mark.parametrize("scalings", [(0.5, 0.5, 0.5), (2.0, 0.25, 1.0)])
def test_the_update_of_each_row(which, ranks, scalings):
    all_A, all_B = factors(*ranks)
    rows = which or [0, 1, 2]
    x, y = (torch.randn(len(rows), 4, size, dtype=torch.float64, requires_grad=True) for size in (IN, OUT))
    each = [y[row] + scalings[n] * x[row] @ all_A[n].T @ all_B[n].T for row, n in enumerate(rows)]
    out = add_low_rank_by_row(y, x, all_A, all_B, scalings, which and torch.tensor(which))
    same(out, torch.stack(each), (x, y, *all_A, *all_B))


@torch.no_grad()
def test_without_gradients_the_output_is_overwritten_if_it_can_be():
    all_A, all_B = factors(3, 3)
    x = torch.randn(2, 4, IN).bfloat16()
    for y in (torch.zeros(2, 4, OUT).bfloat16(), torch.zeros(2, OUT, 4).bfloat16().mT):
        exact = 0.5 * x.double() @ all_A[0].T @ all_B[0].T
        for out in (
            add_low_rank(y.clone(), x, all_A[0], all_B[0], 0.5),
            add_low_rank_by_row(y.clone(), x, all_A, all_B, (0.5, 0.5), torch.tensor([0, 0])),
        ):
            assert out.dtype is torch.bfloat16
            assert (out.double() - exact).norm() < 0.02 * exact.norm()
        assert (add_low_rank(y, x, all_A[0], all_B[0], 0.5) is y) == y.is_contiguous()


def test_row_norms_are_those_of_the_dense_matrix():
    (A,), (B,) = factors(3)
    W = torch.randn(OUT, IN, dtype=torch.float64)
    same(row_norms(W, A, B, 0.5), (W + 0.5 * B @ A).norm(dim=1), (A, B))
