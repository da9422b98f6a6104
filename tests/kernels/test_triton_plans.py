"""A plan for a GPU runs on fake CUDA tensors, where there need not be one: the twins allocate and launch nothing.

Torch's backward pass asks for a real device even then, so the functions that it would call are called here.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nbtune.kernels.gated import gated, gated_backward_
from nbtune.kernels.linear_cross_entropy import _Logits
from nbtune.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from nbtune.kernels.rope import LAYOUTS, rotate
from nbtune.kernels.triton import use_triton

T, D = 12, 32


@pytest.fixture
def fake():
    """Make a fake CUDA tensor of a size and a dtype."""
    with FakeTensorMode():
        yield lambda *size, dtype=torch.bfloat16: torch.empty(size, dtype=dtype, device="cuda")


def assert_like(tensor, other):
    assert (tensor.shape, tensor.dtype, tensor.device) == (other.shape, other.dtype, other.device)


def test_the_norm(fake):
    x, weight = fake(T, D), fake(D)
    y, reciprocal = rms_norm_forward(x, weight, 1e-5)
    assert_like(y, x)
    assert_like(reciprocal, fake(T, 1, dtype=torch.float32))
    grad_x, grad_weight = rms_norm_backward(y, x, weight, reciprocal, needs_weight=True)
    assert_like(grad_x, x)
    assert_like(grad_weight, weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rotation(fake, layout):
    x, angles = fake(1, 4, T, 8), fake(1, T, 8)
    y = rotate(x, angles, angles, layout=layout)
    assert_like(y, x)
    assert y.transpose(1, 2).is_contiguous()
    assert rotate(y, angles, angles, layout=layout, out=y) is y


def test_the_gated_activation(fake):
    g, u = fake(T, D), fake(T, D)
    h = gated(g, u, "silu")
    assert_like(h, g)
    gated_backward_(h, g, u, "silu")


def test_the_loss(fake):
    product, labels = fake(T, 100), fake(T, dtype=torch.long)
    sums = _Logits(1.0, None, 0.0).sums(product, labels, (product, product), gradient=product)
    assert_like(sums, fake(3, dtype=torch.float32))


def test_what_has_a_twin(fake):
    assert use_triton(fake(2))
    assert not use_triton(fake(2, dtype=torch.float64))
    assert not use_triton(torch.empty(2))
