"""Gated activations' Triton twin, interpreted on the CPU and on a GPU, against the eager form in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from triton_compiling import CAPABILITIES, machine_code

from nbtune.kernels.gated import ACTIVATIONS, gated, gated_activation, gated_backward_
from nbtune.kernels.triton import gated as twin

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-7}
SHAPES = [(3, 2, 1037), (7, 5), (1, 1), (0, 4)]


def close(found, right):
    for mine, goal in zip(found, right, strict=True):
        tolerance = TOLERANCES[mine.dtype]
        torch.testing.assert_close(mine.double(), goal, atol=4 * tolerance, rtol=4 * tolerance)


def check(device, name, dtype, shape):
    torch.manual_seed(0)
    dh, g, u = ((torch.randn(shape, device=device) * 3).to(dtype) for _ in range(3))
    exact = [x.double() for x in (dh, g, u)]
    right = gated(exact[1], exact[2], name)
    found = torch.empty_like(g)
    twin.forward(g, u, name, found)
    close([found], [right])
    own = g.clone()
    twin.forward(own, u, name, own)
    assert torch.equal(own, found)
    twin.backward_(dh, g, u, name)
    gated_backward_(*exact, name)
    close([dh, g, u], exact)


def check_halves_of_one_tensor(device):
    torch.manual_seed(0)
    both, dh = torch.randn(6, 40, device=device), torch.randn(6, 20, device=device)
    exact, exact_dh = both.double(), dh.double()
    twin.backward_(dh, *both.chunk(2, -1), "silu")
    gated_backward_(exact_dh, *exact.chunk(2, -1), "silu")
    close([both, dh], [exact, exact_dh])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_interpreted(interpreted, name, dtype, shape):
    interpreted(check, "cpu", name, dtype, shape)


def test_interpreted_with_strides(interpreted):
    interpreted(check_halves_of_one_tensor, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_on_a_gpu(name):
    for dtype, shape in itertools.product(TOLERANCES, [*SHAPES, (300, 11008)]):
        check("cuda", name, dtype, shape)
    check_halves_of_one_tensor("cuda")


@pytest.mark.gpu
def test_cuda_tensors_past_2_to_the_31_elements():
    g = torch.randn(70_000, 32_768, device="cuda", dtype=torch.bfloat16)
    u = torch.randn_like(g)
    right = gated(g[-2:].cpu().double(), u[-2:].cpu().double(), "silu")
    close([gated_activation(g, u, "silu")[-2:].cpu()], [right])


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_it_compiles(name, capability):
    for kernel, tensors in ((twin._forward, ("g", "u", "out")), (twin._backward, ("dh", "g", "u"))):
        constants = {"ACTIVATION": name, "TILE": twin.TILE}
        sizes = {p: "i32" for p in kernel.arg_names if p not in tensors and p not in constants}
        assert machine_code(kernel, capability, **dict.fromkeys(tensors, "*bf16"), **sizes, **constants)
