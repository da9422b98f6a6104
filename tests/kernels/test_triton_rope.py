"""The rotation's Triton twin, interpreted on the CPU and on a GPU, against the eager form in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from triton_compiling import CAPABILITIES, machine_code

from nbtune.kernels.rope import LAYOUTS, rope, rotate
from nbtune.kernels.triton import rope as twin

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


def inputs(device, layout, dtype, angle_dtype, batch=2, tokens=5, heads=3, head_dim=20, width=12, angles=1):
    """Any coefficients that are alike where the layout reads one angle twice; strided angles, token-major x."""
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, heads, head_dim, device=device).to(dtype).transpose(1, 2)
    half = torch.randn(2, angles, tokens, width // 2, device=device)
    if layout != "half_once":
        half = half.repeat_interleave(2, -1) if layout == "interleaved" else torch.cat([half, half], -1)
    cos, sin = half.to(angle_dtype).unbind()
    return x, cos.mT.contiguous().mT, sin


def check(device, layout, dtype, angle_dtype, sizes):
    x, cos, sin = inputs(device, layout, dtype, angle_dtype, **sizes)
    width = cos.shape[-1] * (2 if layout == "half_once" else 1)
    for inverse in (False, True):
        right = rotate(x.double(), cos.double(), sin.double(), layout=layout, inverse=inverse)
        own = x.clone(memory_format=torch.preserve_format)
        twin.rotate(own, cos, sin, width // 2, layout=layout, inverse=inverse, out=own)
        other = torch.empty(x.shape, dtype=dtype, device=device)  # head-major
        other[..., width:] = x[..., width:]
        twin.rotate(x, cos, sin, width // 2, layout=layout, inverse=inverse, out=other)
        assert torch.equal(own, other)
        scale = right.abs().max().item()
        torch.testing.assert_close(other.double(), right, atol=TOLERANCES[dtype] * scale, rtol=0)


SIZES = [{}, {"angles": 2}, {"heads": 33, "head_dim": 64, "width": 64}, {"batch": 1, "tokens": 1, "heads": 1}]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_interpreted(interpreted, layout, dtype, sizes):
    interpreted(check, "cpu", layout, dtype, dtype, sizes)


def test_interpreted_with_angles_of_more_precision(interpreted):
    interpreted(check, "cpu", "half", torch.bfloat16, torch.float32, {})


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_a_gpu(layout):
    for dtype, sizes in itertools.product(
        TOLERANCES, [*SIZES, {"tokens": 4096, "heads": 32, "head_dim": 128, "width": 128}]
    ):
        check("cuda", layout, dtype, dtype, sizes)
        check("cuda", layout, dtype, torch.float32, sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_tensors_and_their_gradients_are_those_of_the_cpu(layout):
    x, cos, sin = inputs("cuda", layout, torch.float32, torch.float32)
    results = []
    for device in ("cuda", "cpu"):
        q, k = (t.to(device).requires_grad_() for t in (x, x[:, :1]))
        turned = rope(q, k, cos.to(device), sin.to(device), layout=layout)
        grads = torch.autograd.grad(turned, (q, k), [t.detach() for t in turned])
        results.append([t.cpu() for t in (*turned, *grads)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_compiles(layout, capability):
    tensors = {"x": "*bf16", "cos": "*bf16", "sin": "*bf16", "out": "*bf16"}
    constants = {"LAYOUT": layout, "INVERSE": True, "TILE_HEADS": 16, "TILE": 64}
    sizes = {name: "i32" for name in twin._rotate.arg_names if name not in tensors and name not in constants}
    assert machine_code(twin._rotate, capability, **tensors, **constants, **sizes)
