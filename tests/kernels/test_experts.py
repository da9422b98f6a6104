"""Experts with low-rank updates against one dense weight per expert, in fp64 (a loop) and in fp32 (torch's kernel)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from nbtune.kernels.experts import experts_forward
from nbtune.kernels.low_rank import LowRank

NAMES = ("gate_up_proj", "down_proj")


def experts(dtype):
    torch.manual_seed(0)
    base = MixtralExperts(MixtralConfig(hidden_size=16, intermediate_size=8, num_local_experts=5)).to(dtype)
    for weight in base.parameters():
        nn.init.normal_(weight, std=0.3)
    return base.requires_grad_(False)


def update(base, names, rank=4):
    def normal(*shape):
        return torch.randn(*shape, dtype=base.down_proj.dtype, requires_grad=True)

    sizes = {name: base.get_parameter(name).shape for name in names}
    return {name: LowRank(normal(E, rank, n), normal(E, out, rank), 0.5) for name, (E, out, n) in sizes.items()}


def dense(base, factors, x, index, weights):
    """Token by token, with whole updated weights."""
    changed = dict(base.named_parameters())
    for name, (A, B, scaling) in factors.items():
        changed[name] = changed[name] + scaling * B @ A
    rows = []
    for token, chosen, shares in zip(x, index, weights, strict=True):
        row = 0
        for expert, share in zip(chosen, shares, strict=True):
            gate, up = (changed["gate_up_proj"][expert] @ token).chunk(2)
            row = row + share * (changed["down_proj"][expert] @ (base.act_fn(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_values_and_gradients_are_those_of_dense_weights_and_each_token_has_its_update(dtype, tolerance):
    base = experts(dtype)
    updates = [update(base, NAMES), update(base, NAMES[1:])]
    x = torch.randn(6, 16, dtype=dtype, requires_grad=True)
    index, weights = torch.tensor([[0, 4], [4, 2], [2, 0], [0, 2], [4, 0], [2, 4]]), torch.rand(6, 2, dtype=dtype)
    which = torch.tensor([1, 0, -1, 0, 1, -1])
    out = experts_forward(base, updates, which, x, index, weights)
    each = torch.stack([dense(base, factors, x, index, weights) for factors in (*updates, {})])
    expected = each[which, torch.arange(6)]
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    assert (each[0] - each[2]).abs().max() > 0.1
    leaves = [x, *(factor for factors in updates for A, B, _ in factors.values() for factor in (A, B))]
    to = torch.randn_like(out)
    found, right = (torch.autograd.grad((y * to).sum(), leaves) for y in (out, expected))
    for mine, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)
    without = experts_forward(base, [], None, x, index, weights)
    torch.testing.assert_close(without, each[2], atol=tolerance, rtol=tolerance)
