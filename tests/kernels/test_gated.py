"""Gated activations against transformers' and autograd in fp64; buffers that are overwritten; what is saved."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from nbtune.kernels.gated import ACTIVATIONS, gated, gated_activation, gated_backward_

SHAPE = (2, 150, 200)  # several blocks of rows, the last one short


def inputs(dtype, shape=SHAPE):
    torch.manual_seed(0)
    return [(torch.randn(shape) * 3).to(dtype) for _ in range(3)]  # dh, g, u


def by_autograd(dh, g, u, act):
    """h, dL/dg and dL/du."""
    g, u = g.clone().requires_grad_(), u.clone().requires_grad_()
    h = act(g) * u
    return h.detach(), *torch.autograd.grad(h, (g, u), dh)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("nbtune.kernels.row_blocks.BLOCK_BYTES", 2**16)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_names_are_those_of_transformers(name):
    x = torch.linspace(-20, 20, 1001)
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name](x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_gradients_are_no_farther_from_fp64_than_autograd(name, dtype):
    dh, g, u = inputs(dtype)
    reference = by_autograd(dh, g, u, ACT2FN[name])
    right = by_autograd(dh.double(), g.double(), u.double(), ACT2FN[name])
    forward = gated(g, u, name)
    gated_backward_(dh, g, u, name)
    for mine, other, goal in zip((forward, dh, g, u), (reference[0], *reference), (right[0], *right), strict=True):
        assert mine.dtype is dtype
        assert (mine - goal).norm() <= 1.05 * (other - goal).norm() + 5e-7 * goal.norm()


@pytest.mark.parametrize("name", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_bits_are_those_of_transformers_where_torch_has_the_activation(name, dtype):
    _, g, u = inputs(dtype)
    expected = ACT2FN[name](g) * u
    assert torch.equal(gated(g, u, name), expected)
    assert gated(g, u, name, out=g) is g
    assert torch.equal(g, expected)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_extreme_gates_give_finite_results(name):
    g = torch.tensor([[-1e4, -90.0, -12.0, 0.0, 12.0, 90.0, 1e4]])
    u, dh = torch.ones_like(g), torch.ones_like(g)
    right = by_autograd(dh.double(), g.double(), u.double(), ACT2FN[name])
    gated_backward_(dh, g, u, name)
    for mine, goal in zip((dh, g, u), right, strict=True):
        torch.testing.assert_close(mine.double(), goal, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_in_fp64(name):
    _, g, u = (x.requires_grad_() for x in inputs(torch.float64, (2, 3, 5)))
    assert torch.autograd.gradcheck(lambda g, u: gated_activation(g, u, name), (g, u))
    assert torch.autograd.gradcheck(
        lambda g, u: gated_activation(g.transpose(0, 1)[..., ::2], u[..., :3].transpose(0, 1), name), (g, u)
    )


def test_only_gate_and_values_are_saved_and_they_stay():
    dh, g, u = inputs(torch.bfloat16)
    g, u = g.requires_grad_(), u.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        h = gated_activation(g, u, "silu")
    assert {t.data_ptr() for t in saved} == {g.data_ptr(), u.data_ptr()}
    once = torch.autograd.grad(h, (g, u), dh, retain_graph=True)
    again = torch.autograd.grad(h, (g, u), dh)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


class Overwriting(torch.autograd.Function):
    """As a fused MLP does: its own saved tensors are overwritten by the backward pass."""

    @staticmethod
    def forward(ctx, x):
        g, u = x * 2, x * 3
        ctx.save_for_backward(g, u)
        return gated(g, u, "silu")

    @staticmethod
    def backward(ctx, *grads):
        dh, (g, u) = grads[0].clone(), ctx.saved_tensors
        gated_backward_(dh, g, u, "silu")
        return 2 * g + 3 * u


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_pass_over_overwritten_buffers_is_refused(dtype):
    x = torch.randn(4, 6).to(dtype).requires_grad_()
    h = Overwriting.apply(x)
    h.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()
