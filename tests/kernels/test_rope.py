"""Rotary embeddings of each layout against transformers' functions and in fp64; what is saved, and how results lie."""

from __future__ import annotations

import pytest
import torch
from transformers.models.cohere import modeling_cohere
from transformers.models.ernie4_5 import modeling_ernie4_5
from transformers.models.glm import modeling_glm
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama
from transformers.models.olmo2 import modeling_olmo2

from nbtune.kernels.rope import LAYOUTS, rope, rotate

B, T, HEADS, KV_HEADS, HEAD_DIM = 2, 37, 6, 2, 16
CASES = [
    (modeling_llama, "half", HEAD_DIM),
    (modeling_gpt_neox, "half", 10),
    (modeling_cohere, "interleaved", HEAD_DIM),
    (modeling_glm, "interleaved_first", 8),
    (modeling_ernie4_5, "interleaved_first", HEAD_DIM),
    (modeling_gpt_oss, "half_once", HEAD_DIM),
]


def inputs(width, dtype=torch.float32, layout="half", batch=1):
    torch.manual_seed(0)
    q, k = (torch.randn(B, T, heads * HEAD_DIM).to(dtype) for heads in (HEADS, KV_HEADS))
    q, k = (x.view(B, T, -1, HEAD_DIM).transpose(1, 2) for x in (q, k))
    angle = torch.rand(batch, T, width // 2) * 6
    if layout != "half_once":
        angle = angle.repeat_interleave(2, -1) if layout == "interleaved" else torch.cat([angle, angle], -1)
    return q, k, angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize(("module", "layout", "width"), CASES)
def test_it_turns_as_transformers_does(module, layout, width, batch):
    q, k, cos, sin = inputs(width, layout=layout, batch=batch)
    for mine, theirs in zip(
        rope(q, k, cos, sin, layout=layout), module.apply_rotary_pos_emb(q, k, cos, sin), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("module", "layout", "width"), CASES)
def test_values_and_gradients_are_no_farther_from_fp64(module, layout, width, dtype):
    q, k, cos, sin = inputs(width, dtype, layout)
    to = [torch.randn_like(x) for x in (q, k)]

    def run(f, *tensors, to, **options):
        leaves = [x.clone().requires_grad_() for x in tensors[:2]]
        results = f(*leaves, *tensors[2:], **options)
        return *results, *torch.autograd.grad(results, leaves, to)

    right = run(
        rope, *(x.double() for x in (q, k, cos, sin)), to=[x.double() for x in to], layout=layout
    )  # checked against finite differences below
    found = run(rope, q, k, cos, sin, to=to, layout=layout)
    reference = run(module.apply_rotary_pos_emb, q, k, cos, sin, to=to)
    for mine, other, goal in zip(found, reference, right, strict=True):
        assert mine.dtype is dtype
        assert (mine - goal).norm() <= 1.05 * (other - goal).norm() + 1e-7 * goal.norm()


def test_angles_of_more_precision_are_not_rounded():
    q, k, cos, sin = inputs(HEAD_DIM)
    q, k = q.bfloat16(), k.bfloat16()
    for mine, theirs in zip(rope(q, k, cos, sin), modeling_olmo2.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert mine.dtype is torch.bfloat16
        torch.testing.assert_close(mine, theirs, atol=0, rtol=2**-7)  # one unit in the last place
        assert (mine == theirs).float().mean() > 0.999


@pytest.mark.parametrize("width", [8, HEAD_DIM])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_fp64(layout, width):
    q, k, cos, sin = (x[..., :5, :] for x in inputs(width, torch.float64, layout))
    # Not the angles of a rotation: the gradient must be right for any coefficients that the layout reads once.
    leaves = [x.transpose(1, 2).clone().requires_grad_() for x in (q[:1, :2], k[:1, :1])]

    def f(q, k):
        return rope(q.transpose(1, 2), k.transpose(1, 2), 1.5 * cos, sin, layout=layout)

    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [8, HEAD_DIM])
def test_a_rotation_is_undone_by_its_inverse_and_may_be_in_place(layout, width):
    q, _, cos, sin = inputs(width, torch.float64, layout)
    turned = rotate(q, cos, sin, layout=layout)
    torch.testing.assert_close(rotate(turned, cos, sin, layout=layout, inverse=True), q)
    mine = q.clone()
    assert rotate(mine, cos, sin, layout=layout, out=mine) is mine
    assert torch.equal(mine, turned)
    mine = torch.full((B, HEADS, T, HEAD_DIM), torch.nan, dtype=torch.float64)
    assert torch.equal(rotate(q, cos, sin, layout=layout, out=mine), turned)


def test_angles_given_twice_may_be_read_once():
    q, k, cos, sin = inputs(HEAD_DIM)
    for once, twice in zip(rope(q, k, cos, sin, layout="half_once"), rope(q, k, cos, sin), strict=True):
        assert torch.equal(once, twice)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_and_gradients_are_token_major(layout):
    q, k, cos, sin = inputs(HEAD_DIM, layout=layout)
    leaves = [x.contiguous().requires_grad_() for x in (q, k)]  # head-major
    turned = rope(*leaves, cos, sin, layout=layout)
    grads = torch.autograd.grad(turned, leaves, [x.detach().contiguous() for x in turned])
    assert all(x.transpose(1, 2).is_contiguous() for x in (*turned, *grads))


def test_only_the_angles_are_saved():
    q, k, cos, sin = inputs(HEAD_DIM, torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rope(q.requires_grad_(), k.requires_grad_(), cos, sin)
    assert {t.data_ptr() for t in saved} == {cos.data_ptr(), sin.data_ptr()}


def test_what_is_overwritten_and_needed_is_noticed():
    q, k, cos, sin = inputs(HEAD_DIM)
    leaf = q.clone().requires_grad_()
    square = leaf.square()
    needed = square.exp()  # saves its own result
    rotate(needed.detach(), cos, sin, out=needed.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        needed.sum().backward()
    turned = rope(leaf, k, cos, sin)
    cos.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        turned[0].sum().backward()
