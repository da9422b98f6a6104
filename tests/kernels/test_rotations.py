"""Rotations, by blocks, butterflies, reflections and pairs, in fp64."""

from __future__ import annotations

import peft
import pytest
import torch

from nbtune.kernels import rotations

ONE = torch.eye(16, dtype=torch.float64)


def close(result, expected):
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=0)


def butterfly_blocks(factors):
    Q = torch.randn(factors, 8, 2, 2, dtype=torch.float64)
    return rotations.cayley(Q - Q.mT)


def test_cayley_is_a_rotation_and_the_series_tends_to_its_transpose():
    entries = 0.1 * torch.randn(5, 6, dtype=torch.float64)
    Q = rotations.skew_symmetric(entries, 4)
    assert torch.equal(Q, -Q.mT)
    assert torch.equal(Q[:, 0, 1:], entries[:, :3])
    R = rotations.cayley(Q)
    close(R @ R.mT, ONE[:4, :4].expand(5, 4, 4))
    close(rotations.cayley_series(Q, 40), R.mT)
    assert (R - ONE[:4, :4]).abs().max() > 0.01


@pytest.mark.parametrize("terms", range(2, 9))
def test_the_series_is_that_of_peft(terms):
    theirs = peft.tuners.oft.layer.OFTRotationModule(2, 6, 4, 8, num_cayley_neumann_terms=terms)
    theirs.weight.data.normal_(std=0.1)
    blocks = rotations.cayley_series(rotations.skew_symmetric(theirs.weight.data, 4), terms)
    turned = rotations.rotated_blocks(torch.eye(8), blocks)
    torch.testing.assert_close(turned, theirs.get_weight(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("factors", [1, 2, 3, 4])
def test_the_butterfly_mixes_all_inputs(factors):
    """With m factors each input reaches b 2^(m - 1) others; block-diagonal rotations reach b."""
    blocks = butterfly_blocks(factors)
    R = rotations.butterfly(ONE, blocks)
    assert ((R.abs() > 1e-12).sum(1) == 2**factors).all()
    close(R @ R.T, ONE)
    close(rotations.butterfly(ONE, blocks, transposed=True), R.T)


def test_reflections_are_the_product_of_their_matrices():
    vectors = torch.randn(16, 5, dtype=torch.float64)
    for orthogonal, each in ((False, vectors / vectors.norm(dim=0)), (True, torch.linalg.qr(vectors).Q)):
        H = ONE
        for u in each.T:
            H = H @ (ONE - 2 * torch.outer(u, u))
        close(rotations.reflected(ONE, vectors, orthogonal=orthogonal), H.T)
        close(rotations.reflected(ONE, vectors, orthogonal=orthogonal, transposed=True), H)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_pairs_turn_among_themselves(size):
    angles, scales = torch.randn(2, size, dtype=torch.float64)
    R = rotations.rotated_pairs(ONE[:8, :8], angles, scales, 4).T
    pairs = torch.tensor([[0, 2], [1, 3], [4, 6], [5, 7]])
    inside = torch.zeros(8, 8, dtype=torch.bool)
    for number, pair in enumerate(pairs):
        inside[pair[:, None], pair] = True
        group, place = divmod(number, 2)
        a, t = scales.view(2, -1, 2)[group, :, place], angles.view(2, -1, 2)[group, :, place]  # [1, 2 or 4]
        first = torch.stack([a[0] * t[0].cos(), -a[-2:][0] * t[-2:][0].sin()])
        second = torch.stack([a[-1] * t[-1].sin(), a[:2][-1] * t[:2][-1].cos()])
        close(R[pair[:, None], pair], torch.stack([first, second]))
    assert (R[~inside] == 0).all()


def test_dropout_takes_the_blocks_that_peft_takes():
    blocks = torch.randn(3, 8, 4, 4)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = peft.tuners.boft.layer.MultiplicativeDropoutLayer(0.4).train()(blocks)
        torch.manual_seed(seed)
        assert torch.equal(rotations.dropped_blocks(blocks, 0.4), expected)


def test_inputs_in_half_precision_are_computed_in_that_of_the_rotation():
    x = torch.randn(3, 16).bfloat16()
    blocks, vectors = butterfly_blocks(1), torch.randn(16, 3, dtype=torch.float64)
    for kernel, trained in ((rotations.butterfly, blocks), (rotations.reflected, vectors)):
        out = kernel(x, trained)
        assert out.dtype is torch.bfloat16
        assert torch.equal(out, kernel(x.double(), trained).bfloat16())
