"""A token of each row by any adapter: the same as each row alone, and nothing is kept of what is not a parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nbtune.kernels.casts import Casts, casts_kept, joined
from nbtune.kernels.low_rank_update import a_token_each, add_low_rank, add_to_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_gets_the_update_of_its_own_adapter(dtype):
    torch.manual_seed(0)
    ranks, scalings = (4, 8, 2), (2.0, 0.7, 1.0)
    all_A = [nn.Parameter(torch.randn(rank, 32)) for rank in ranks]
    all_B = [nn.Parameter(torch.randn(24, rank)) for rank in ranks]
    x, y = torch.randn(5, 1, 32, dtype=dtype), torch.randn(5, 1, 24, dtype=dtype)
    which = (1, -1, 0, 2, 1)
    expected = y.double()
    for row, number in enumerate(which):
        if number >= 0:
            expected[row] += scalings[number] * (x[row].double() @ all_A[number].double().T @ all_B[number].double().T)
    casts: Casts = {}
    tolerance = 1e-4 if dtype is torch.float32 else 0.3  # half a step of bf16 where values are near 64
    with torch.inference_mode(), casts_kept(casts):
        assert a_token_each(y, x)
        for _ in range(2):
            found = add_to_tokens(y.clone(), x, all_A, all_B, scalings, torch.tensor(which))
            torch.testing.assert_close(found.double(), expected.detach(), atol=tolerance, rtol=0)
        alone = add_low_rank(y[2:3].clone(), x[2:3], all_A[0], all_B[0], scalings[0])
        torch.testing.assert_close(alone.double(), expected[2:3].detach(), atol=tolerance, rtol=0)
    assert len(casts) == 3  # the joined factors, and whose each place is; twice the same
    assert not a_token_each(y, x)  # nothing is kept here


def test_what_is_computed_anew_each_time_is_not_kept():
    casts: Casts = {}
    with torch.inference_mode(), casts_kept(casts):
        for _ in range(3):
            joined([torch.randn(2, 3), torch.randn(2, 3)], 0, torch.bfloat16)
    assert casts == {}
