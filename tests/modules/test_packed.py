"""Packed linear layers against the plain ones, and against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nbtune.modules.packed import PackedLinear, pack

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 33, 300])
def test_a_product_is_as_exact_as_the_plain_one(rows, bias):
    torch.manual_seed(rows)
    linear = nn.Linear(96, 160, bias=bias).bfloat16()
    x = torch.randn(rows, 1, 96).bfloat16()
    with torch.inference_mode():
        packed, plain = PackedLinear.of(linear)(x), linear(x)
        exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    assert packed.shape == plain.shape
    assert packed.dtype is torch.bfloat16
    worst = (plain - exact).abs().max()
    assert (packed - exact).abs().max() <= worst + 1e-6
    torch.testing.assert_close(packed, plain, rtol=2**-7, atol=2**-7)


def test_a_model_keeps_its_parameters_and_what_is_not_bf16():
    model = nn.Sequential(nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 4)))
    model[3].bfloat16()
    before = dict(model.named_parameters())
    keys = list(model.state_dict())
    pack(model)
    assert [type(layer) for layer in (model[0], model[1], model[3][0])] == [PackedLinear, nn.Linear, PackedLinear]
    assert list(model.state_dict()) == keys
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
