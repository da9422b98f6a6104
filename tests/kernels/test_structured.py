"""Structured matrices, and their products without them, against dense ones in fp64, with gradients."""

from __future__ import annotations

import pytest
import torch

from nbtune.kernels import structured


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def same(product, x, matrix, *parts):
    """The product, and its gradients for x and the parts, are those of x M^T."""
    expected = x @ matrix.T
    torch.testing.assert_close(product, expected, atol=1e-12, rtol=0)
    to = torch.randn_like(expected)
    found, right = (torch.autograd.grad((y * to).sum(), (x, *parts), retain_graph=True) for y in (product, expected))
    for mine, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=0)


@pytest.mark.parametrize("right", [[(4, 5)], [(4, 2), (2, 5)]], ids=["whole", "factors"])
def test_kronecker(right):
    x, left, parts = random(2, 3, 15), random(2, 3), [random(*shape) for shape in right]
    matrix = torch.kron(left, parts[0] if len(parts) == 1 else parts[0] @ parts[1])
    same(structured.kronecker_product(x, left, *parts), x, matrix, left, *parts)
    assert structured.kronecker_product(x[:, :0], left, *parts).shape == (2, 0, 8)


@pytest.mark.parametrize(("rank", "inner"), [(2, 40), (5, 8)], ids=["low-rank", "formed"])
def test_hadamard(rank, inner):
    x, parts = random(3, inner), [random(*shape) for shape in 2 * [(30, rank), (rank, inner)]]
    matrix = (parts[0] @ parts[1]) * (parts[2] @ parts[3])
    same(structured.hadamard_product(x, *parts), x, matrix, *parts)
    assert structured.hadamard_product(x.float(), *parts).dtype is torch.float32


def test_tucker():
    core, rows, columns = random(2, 2, 3, 3), random(2, 5), random(2, 4)
    out = structured.tucker_product(core, rows, columns)
    torch.testing.assert_close(out[:, :, 1, 2], rows.T @ core[:, :, 1, 2] @ columns)
    assert out.shape == (5, 4, 3, 3)


@pytest.mark.parametrize("size", [1, 4, 5])
def test_circulant(size):
    x, kernels = random(2, 3 * size), random(2, 3, size)
    matrix = structured.circulant(kernels)
    for row in range(2 * size):
        for column in range(3 * size):
            (m, i), (n, j) = divmod(row, size), divmod(column, size)
            assert matrix[row, column] == kernels[m, n, (j - i) % size]
    same(structured.circulant_product(x, kernels), x, matrix, kernels)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_granular(k):
    x, A, B = random(2, 4, 12), random(k, 12 // k, 6), random(k, 6, 18 // k)
    matrix = structured.granular(A, B)
    each = 6 // k
    for m in range(k):
        for n in range(k):
            first, second = A[n][:, m * each : (m + 1) * each], B[m][n * each : (n + 1) * each]
            block = matrix[m * 18 // k : (m + 1) * 18 // k, n * 12 // k : (n + 1) * 12 // k]
            torch.testing.assert_close(block, (first @ second).T)
    same(structured.granular_product(x, A, B), x, matrix, A, B)
