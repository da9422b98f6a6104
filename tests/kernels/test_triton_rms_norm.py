"""RMSNorm's Triton twin, interpreted on the CPU and compiled where there is a GPU, against fp64 and the eager form."""

from __future__ import annotations

import itertools

import pytest
import torch
from triton_compiling import CAPABILITIES, machine_code

from nbtune.kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_forward
from nbtune.kernels.triton import rms_norm as twin

SHAPES = [(5, 37), (2, 9, 3, 64), (3, 5000), (1, 1), (0, 8)]
FORMS = [(0.0, True), (0.0, False), (1.0, False)]
# In units of the dtype's resolution. The interpreter cuts bf16 off where hardware rounds it.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


def check(device, shape, dtype, offset, cast_first, weighted):
    torch.manual_seed(0)
    x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1], device=device).to(dtype) if weighted else None
    y, reciprocal = twin.forward(x, weight, 1e-5, offset, cast_first)
    grads = twin.backward(grad, x, weight, reciprocal, offset, needs_weight=weighted)

    wide = [tensor if tensor is None else tensor.double() for tensor in (x, weight, grad)]
    right, exact_reciprocal = rms_norm_forward(*wide[:2], 1e-5, offset, cast_first)
    exact = rms_norm_backward(wide[2], *wide[:2], exact_reciprocal, offset, needs_weight=weighted)
    assert y.dtype is dtype
    for mine, goal in zip((y, reciprocal, *grads), (right, exact_reciprocal, *exact), strict=True):
        assert (mine is None) == (goal is None)
        if goal is not None:
            scale = max(1.0, *goal.abs().flatten().tolist()) if goal.numel() else 1.0
            torch.testing.assert_close(mine.double(), goal, atol=TOLERANCES[dtype] * scale, rtol=0)


def check_strides_and_what_is_not_needed(device):
    torch.manual_seed(0)
    x = torch.randn(4, 6, 24, device=device)[:, ::2, 3:19]
    weight, grad = torch.randn(16, device=device), torch.randn(4, 16, 3, device=device).mT
    y, r = twin.forward(x, weight, 1e-5)
    torch.testing.assert_close(y, rms_norm_forward(x, weight, 1e-5)[0])
    right = rms_norm_backward(grad, x, weight, r, needs_weight=True)
    torch.testing.assert_close(twin.backward(grad, x, weight, r, needs_weight=True), right, rtol=1e-5, atol=1e-5)
    assert twin.backward(grad, x, weight, r)[1] is None
    only = twin.backward(grad, x, weight, r, needs_x=False, needs_weight=True)
    assert only[0] is None
    torch.testing.assert_close(only[1], right[1], rtol=1e-5, atol=1e-5)
    wide = twin.forward(x.bfloat16(), weight, 1e-5)[0]  # trained in fp32, where Llama's form gives fp32
    assert wide.dtype is torch.float32
    torch.testing.assert_close(wide, rms_norm_forward(x.bfloat16(), weight, 1e-5)[0], rtol=2**-7, atol=0)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_interpreted(interpreted, shape, dtype, form, weighted):
    interpreted(check, "cpu", shape, dtype, *form, weighted)


def test_interpreted_with_strides(interpreted):
    interpreted(check_strides_and_what_is_not_needed, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (2100, 8192)])
def test_on_a_gpu(shape):
    for dtype, form, weighted in itertools.product(TOLERANCES, FORMS, [True, False]):
        check("cuda", shape, dtype, *form, weighted)
    check_strides_and_what_is_not_needed("cuda")


@pytest.mark.gpu
def test_the_norm_of_cuda_tensors_is_the_twin():
    x = torch.randn(70_000, 32_768, device="cuda", dtype=torch.bfloat16)  # more than 2^31 elements
    weight = torch.randn(32_768, device="cuda", dtype=torch.bfloat16)
    y = rms_norm(x.requires_grad_(), weight, 1e-5)
    assert torch.equal(y[-3:], twin.forward(x[-3:].detach(), weight, 1e-5)[0])
    (grad,) = torch.autograd.grad(y, x, y)
    one = x[-3:].detach().cpu().requires_grad_()
    right = rms_norm(one, weight.cpu(), 1e-5)
    (right,) = torch.autograd.grad(right, one, right.detach())
    torch.testing.assert_close(grad[-3:].cpu(), right, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_it_compiles(capability):
    tile = {"TILE_ROWS": 4, "TILE": 1024}
    strides = {"rows": "i32", "width": "i32", "x_stride": "i32", "offset": "fp32"}
    tensors = {"x": "*bf16", "weight": "*fp32", "reciprocal": "*fp32"}
    shared = {**tile, **strides, **tensors}
    assert machine_code(twin._forward, capability, **shared, y="*fp32", eps="fp32", CAST_FIRST=True)
    more = {"grad": "*bf16", "grad_x": "*bf16", "partial": "*fp32", "grad_stride": "i32", "tiles": "i32"}
    assert machine_code(twin._backward, capability, **shared, **more)
    assert machine_code(twin._backward, capability, **{**shared, **more, "weight": None, "partial": None})
