"""The Triton kernel of the loss, interpreted on the CPU and on a GPU, against torch's loss in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy
from triton_compiling import CAPABILITIES, machine_code

from nbtune.kernels.triton import cross_entropy as twin

OPTIONS = [(1.0, None, 0.0), (0.5, None, 0.1), (2.0, 5.0, 0.0), (1.0, 30.0, 0.2)]  # scale, softcap, smoothing
VOCABULARIES = [37, 4096, 9001]


def exact(product, labels, scale, softcap, smoothing):
    """The three sums, and the gradient of the loss by the scaled product."""
    scaled = (product.double() * scale).requires_grad_()
    logits = scaled if softcap is None else softcap * torch.tanh(scaled / softcap)
    loss = cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
    logarithms = logits.log_softmax(1)
    sums = [loss, (logits.argmax(1) == labels).sum(), -(logarithms.exp() * logarithms).sum()]
    return torch.stack([x.detach().double() for x in sums]), torch.autograd.grad(loss, scaled)[0]


def check(device, vocabulary, dtype, scale, softcap, smoothing, rows=6, shift=0.0):
    torch.manual_seed(0)
    whole = (torch.randn(rows, vocabulary + 8, device=device) * 4 + shift).to(dtype)
    product = whole[:, :vocabulary]  # rows farther apart than the vocabulary
    labels = torch.randint(vocabulary, (rows,), device=device)
    labels[:2] = product[:2].argmax(1)
    options = {"scale": scale, "softcap": softcap, "smoothing": smoothing}
    right, right_gradient = exact(product, labels, **options)
    tolerance = 1e-5 if dtype is torch.float32 else 2**-7

    before = whole.clone()
    sums = twin.cross_entropy(product, labels, **options, gradient=None)
    torch.testing.assert_close(sums.double(), right, rtol=1e-5, atol=1e-4)
    assert torch.equal(whole, before)
    gradient = torch.empty(rows, vocabulary, dtype=dtype, device=device)
    again = twin.cross_entropy(product, labels, **options, gradient=gradient)
    torch.testing.assert_close(gradient.double(), right_gradient, rtol=tolerance, atol=1e-6)
    in_place = twin.cross_entropy(product, labels, **options, gradient=product)
    assert torch.equal(sums, again)
    assert torch.equal(sums, in_place)
    assert torch.equal(product, gradient)
    assert torch.equal(whole[:, vocabulary:], before[:, vocabulary:])


def check_edges(device):
    """Equal logits are counted as argmax does, large ones do not overflow, and no rows sum to nothing."""
    options = {"scale": 1.0, "softcap": None, "smoothing": 0.0}
    product = torch.zeros(3, 9000, device=device)
    product[:, [4, 8000]] = 1e4
    sums = twin.cross_entropy(product, torch.tensor([4, 8000, 5], device=device), **options, gradient=product)
    torch.testing.assert_close(sums.cpu(), torch.tensor([2 * 0.6931472 + 1e4 + 0.6931472, 1, 3 * 0.6931472]))
    assert product.isfinite().all()
    by_column = torch.randn(9, 4, device=device).T
    labels, gradient = torch.tensor([1, 3, 5, 8], device=device), torch.empty_like(by_column)
    sums = twin.cross_entropy(by_column, labels, **options, gradient=gradient)
    right, right_gradient = exact(by_column, labels, **options)
    torch.testing.assert_close(sums.double(), right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), right_gradient, rtol=1e-5, atol=1e-6)
    none = twin.cross_entropy(product[:0], torch.empty(0, dtype=torch.long, device=device), **options, gradient=None)
    assert none.tolist() == [0, 0, 0]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_interpreted(interpreted, vocabulary, dtype, options):
    interpreted(check, "cpu", vocabulary, dtype, *options)


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_interpreted_far_from_zero(interpreted, shift):
    interpreted(check, "cpu", 9001, torch.bfloat16, 1.0, None, 0.0, 4, shift)
    interpreted(check_edges, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [*VOCABULARIES, 128_256])
def test_on_a_gpu(vocabulary):
    for dtype, options in itertools.product([torch.float32, torch.bfloat16], OPTIONS):
        check("cuda", vocabulary, dtype, *options)
    check_edges("cuda")


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("capped", "gradient"), [(True, "*bf16"), (False, None)])
def test_it_compiles(capped, gradient, capability):
    tensors = {"product": "*bf16", "labels": "*i64", "sums": "*fp32", "gradient": gradient}
    sizes = dict.fromkeys(("vocabulary", "product_row", "product_column", "gradient_row", "gradient_column"), "i32")
    numbers = dict.fromkeys(("scale", "softcap", "smoothing"), "fp32")
    constants = {"HAS_CAP": capped, "TILE": twin.TILE}
    assert machine_code(
        twin._cross_entropy, capability, num_warps=twin.WARPS, **tensors, **sizes, **numbers, **constants
    )
