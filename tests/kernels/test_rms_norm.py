"""RMSNorm against transformers' classes (the same bits) and against autograd in fp64; what it saves."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from nbtune.kernels.rms_norm import rms_norm

GEMMA = {"offset": 1.0, "cast_first": False}
FORMS = [
    (LlamaRMSNorm, {}),
    (GemmaRMSNorm, GEMMA),
    (Olmo2RMSNorm, {"cast_first": False}),
    (GptOssRMSNorm, {"cast_first": False}),
]
LARGE = (3, 130, 96)  # several blocks of rows, the last one short


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("nbtune.kernels.row_blocks.BLOCK_BYTES", 2**16)


def case(cls, shape, dtype, weight_dtype=None):
    torch.manual_seed(0)
    norm = cls(shape[-1], eps=1e-5)
    norm.weight.data += torch.randn(shape[-1]) * 0.3
    return norm.to(weight_dtype or dtype), (torch.randn(shape) * 3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [LARGE, (2, 5, 3, 64), (1, 7), (0, 8)])
@pytest.mark.parametrize(("cls", "form"), FORMS)
def test_the_bits_are_those_of_transformers(cls, form, shape, dtype):
    norm, x = case(cls, shape, dtype)
    assert torch.equal(rms_norm(x, norm.weight, 1e-5, **form), norm(x))


@pytest.mark.parametrize(("cls", "form"), FORMS[:2])
def test_a_weight_that_is_trained_in_fp32_gives_what_it_gives_in_transformers(cls, form):
    norm, x = case(cls, (5, 64), torch.bfloat16, torch.float32)
    mine, theirs = rms_norm(x, norm.weight, 1e-5, **form), norm(x)
    assert mine.dtype is theirs.dtype
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_a_weight(dtype):
    x = torch.randn(5, 96).to(dtype)
    assert torch.equal(rms_norm(x, None, 1e-5), Llama4TextL2Norm(eps=1e-5)(x))


@pytest.mark.parametrize("form", [{}, GEMMA])
@pytest.mark.parametrize("weighted", [True, False])
def test_gradients_in_fp64(form, weighted):
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True) if weighted else None
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-5, **form), (x, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("cls", "form"), FORMS)
def test_gradients_are_no_farther_from_fp64_than_those_of_autograd(cls, form, dtype):
    norm, x = case(cls, LARGE, dtype)
    g = torch.randn(LARGE).to(dtype)

    def exact(x, weight):
        n = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return n * (weight + form.get("offset", 0.0))

    def gradients(f, x, weight, g):
        x, weight = x.clone().requires_grad_(), weight.detach().clone().requires_grad_()
        return torch.autograd.grad(f(x, weight), (x, weight), g)

    def theirs(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, x)

    right = gradients(exact, x.double(), norm.weight.double(), g.double())
    found = gradients(lambda x, weight: rms_norm(x, weight, 1e-5, **form), x, norm.weight, g)
    reference = gradients(theirs, x, norm.weight, g)
    for mine, other, goal, slack in zip(found, reference, right, (1.0, 1.5), strict=True):
        assert mine.dtype is dtype
        assert (mine - goal).norm() <= slack * (other - goal).norm() + 1e-6 * goal.norm()


def test_only_the_input_and_one_number_a_row_are_saved():
    norm, x = case(LlamaRMSNorm, (4, 32, 64), torch.bfloat16)
    x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, norm.weight, 1e-5)
    own = [t for t in saved if t.data_ptr() not in (x.data_ptr(), norm.weight.data_ptr())]
    assert len(saved) == 3
    assert [t.nbytes for t in own] == [4 * 32 * 4]


def test_strided_inputs_and_gradients():
    x = torch.randn(2, 9, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def f(x, weight):
        return rms_norm(x.transpose(1, 2)[..., 2:6], weight, 1e-5).transpose(1, 2)

    assert torch.autograd.gradcheck(f, (x, weight))


def test_an_input_that_changes_before_the_backward_pass_is_noticed():
    norm, x = case(LlamaRMSNorm, (3, 8), torch.float32)
    x = x.requires_grad_().clone()
    y = rms_norm(x, norm.weight, 1e-5)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
