"""Attention within segments against its formula in fp64, and what it holds and keeps."""

import itertools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nbtune.kernels import segment_layout
from nbtune.kernels.cuda_attention import flex_attention
from nbtune.kernels.segment_attention import segment_attention
from tests.kernels.attention_oracle import naive

LENGTHS = {
    "unlike": [5, 1, 17, 9],
    "alike": [16, 16, 32],  # the padded row is the row
    "sorted": [32, 16],  # padded nowhere, but not in order
    "blocks": [200, 3, 130],
    "an empty one": [4, 0, 7],
}
SETTINGS = [
    {},
    {"window": 4},
    {"window": 70, "scaling": 0.3},
    {"softcap": 2.0},
    {"sinks": 6},
    {"prefix": 3},
    {"prefix": 3, "window": 5, "softcap": 1.5, "sinks": 6, "scaling": 0.7},
]


def borders(lengths):
    return [0, *itertools.accumulate(lengths)]


def draw(setting, length, dtype=torch.float64, widths=(8, 4)):
    """Leaves by token [T, heads * width], as projections make them, and the other arguments."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    leaves = [normal(length, 6 * widths[0]), normal(length, 2 * widths[0]), normal(length, 2 * widths[1])]
    setting = dict(setting)
    if "sinks" in setting:
        leaves.append(normal(6))
        setting["sinks"] = leaves[-1]
    if "prefix" in setting:
        setting["prefix"] = tuple(normal(1, 2, setting["prefix"], width) for width in widths)
        leaves += setting["prefix"]
    return leaves, setting


def by_head(leaves):
    return [leaf.view(1, len(leaf), heads, -1).transpose(1, 2) for leaf, heads in zip(leaves, (6, 2, 2), strict=False)]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_equals_the_formula_in_value_and_gradient(lengths, setting):
    leaves, arguments = draw(setting, sum(lengths))
    ours = segment_attention(*by_head(leaves), borders(lengths), **arguments)
    theirs = naive(*by_head(leaves), borders(lengths), **arguments)
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weights = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view_as(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), leaves),
        torch.autograd.grad((theirs * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradients_by_finite_differences():
    leaves, arguments = draw(SETTINGS[-1], 7)
    sinks, *prefix = leaves[3:]

    def function(q, k, v, sinks, *prefix):
        return segment_attention(q, k, v, [0, 5, 7], **{**arguments, "sinks": sinks, "prefix": tuple(prefix)})

    inputs = [tensor.detach().requires_grad_() for tensor in by_head(leaves)]
    assert torch.autograd.gradcheck(function, (*inputs, sinks, *prefix))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_small_tiles_of_single_heads_make_no_difference(setting, monkeypatch):
    leaves, arguments = draw(setting, 90)
    whole = segment_attention(*by_head(leaves), [0, 40, 90], **arguments)
    monkeypatch.setattr(segment_layout, "SCORE_BYTES", 1)
    monkeypatch.setattr(segment_layout, "QUERY_BLOCK", 16)
    segment_layout.padded_row.cache_clear()
    small = segment_attention(*by_head(leaves), [0, 40, 90], **arguments)
    segment_layout.padded_row.cache_clear()
    torch.testing.assert_close(small, whole, rtol=0, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(made.square().sum(), leaves) for made in (small, whole)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("strides", ["by token", "by head"])
def test_gradients_go_back_to_projections_without_a_copy(strides):
    query, key, value = by_head(draw({}, 32)[0])
    if strides == "by head":
        query, key, value = (tensor.contiguous() for tensor in (query, key, value))
    output = segment_attention(query, key, value, [0, 20, 32])
    for grad in torch.autograd.grad(output.sum(), (query, key, value)):
        assert grad.transpose(1, 2).is_contiguous()


# Of bf16, against the formula in fp64 of the same numbers.


def errors(function, leaves, lengths, weights):
    """Relative errors of the outputs and of each gradient."""
    ours = function(*by_head(leaves), borders(lengths))
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    theirs = naive(*by_head(exact), borders(lengths))
    pairs = [(ours, theirs)]
    pairs += zip(
        torch.autograd.grad(ours, leaves, weights), torch.autograd.grad(theirs, exact, weights.double()), strict=True
    )
    return [((a - b).norm() / b.norm()).item() for a, b in pairs]


def sdpa(query, key, value, borders):
    parts = [
        scaled_dot_product_attention(
            *(tensor[:, :, start:end] for tensor in (query, key, value)), is_causal=True, enable_gqa=True
        )
        for start, end in itertools.pairwise(borders)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


@pytest.mark.parametrize("sharpness", [4.0, 8.0])
def test_bf16_is_as_near_to_fp64_as_flash_attention(sharpness):
    lengths = [150, 60, 90]
    leaves, _ = draw({}, 300, torch.bfloat16, (64, 64))
    with torch.no_grad():
        leaves[0] *= sharpness  # scores up to 20 and 40, as in trained models
    weights = torch.randn(1, 300, 6, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours = errors(segment_attention, leaves, lengths, weights)
    theirs = errors(sdpa, leaves, lengths, weights)
    assert ours[0] < 1.35 * theirs[0]  # probabilities are rounded after they are divided by their sum
    assert sum(ours[1:]) < sum(theirs[1:])


# Memory.


class Largest(TorchDispatchMode):
    """Remembers the most elements of any result."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
        return result


@pytest.mark.parametrize("lengths", [[1024], [256] * 4, [512, 300, 200]], ids=str)
def test_no_matrix_of_all_scores(lengths, monkeypatch):
    tokens = sum(lengths)
    leaves, _ = draw({}, tokens, torch.float32, (64, 64))
    monkeypatch.setattr(segment_layout, "SCORE_BYTES", 1 << 18)
    with Largest() as largest:
        output = segment_attention(*by_head(leaves), borders(lengths))
        torch.autograd.grad(output.sum(), leaves)
    assert largest.elements < tokens * 6 * 72  # the inputs, with a few more columns
    assert largest.elements < 6 * max(lengths) ** 2 / 2 or len(lengths) > 1


def test_keeps_inputs_output_and_one_number_a_row():
    leaves, _ = draw({}, 256, torch.bfloat16, (64, 64))
    inputs = by_head(leaves)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        output = segment_attention(*inputs, [0, 128, 256])
    shared = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, output)}
    own = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in shared]
    assert [(tensor.dtype, tensor.numel()) for tensor in own] == [(torch.float32, 256 * 6)]


# Flex attention runs on a GPU; uncompiled, its forward pass is checked here too.


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_flex_attention_by_the_same_formula(setting):
    leaves, arguments = draw(setting, 32, torch.float32, (16, 16))
    inputs = [tensor.detach() for tensor in by_head(leaves)]
    theirs = naive(*inputs, [0, 5, 6, 23, 32], **arguments)
    if "prefix" in arguments:
        arguments["prefix"] = tuple(tensor.detach() for tensor in arguments["prefix"])
    ours = flex_attention(*inputs, [0, 5, 6, 23, 32], compiled=False, **arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
