"""Matrices with few values, and random places for them."""

from __future__ import annotations

import torch

from nbtune.kernels.sparse import random_places, scattered, sparse_product

CPU = torch.device("cpu")


def test_the_product_and_its_gradients_are_those_of_the_dense_matrix():
    places = random_places((6, 5), 12, 3, CPU)
    values, x = torch.randn(12, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 5, dtype=torch.float64)
    x.requires_grad_()
    matrix = scattered(values, places.int(), (6, 5))
    assert (matrix != 0).sum() == 12
    assert torch.equal(matrix[places[0], places[1]], values)
    out, expected = sparse_product(x, values, places.int(), 6), x @ matrix.T
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    to = torch.randn_like(out)
    found, right = (torch.autograd.grad((y * to).sum(), (x, values)) for y in (out, expected))
    for mine, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


def test_places_are_distinct_and_the_seed_decides():
    places = random_places((30, 40), 1200, 7, CPU)
    assert len(torch.unique(places, dim=1).T) == 1200
    assert torch.equal(places[:, :9], random_places((30, 40), 9, 7, CPU))
    assert not torch.equal(places[:, :9], random_places((30, 40), 9, 8, CPU))
    assert torch.equal(random_places((30, 40), 9, None, CPU), random_places((30, 40), 9, None, CPU))
    assert random_places((30, 40), 9, 7, torch.device("meta")).shape == (2, 9)
