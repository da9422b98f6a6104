"""Blocks of rows: on a CPU the passes of an elementwise kernel are made over a part that stays in cache."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BYTES = 2**20  # of one tensor in fp32, for each core; with 1 MiB of L2, 1 to 2 MiB measured best


def block_rows(rows: Tensor) -> int:
    """How many of `rows` [T, D] to treat at a time: all of them on an accelerator, where a pass fills the device."""
    if not rows.is_cpu:
        return max(1, len(rows))
    count = BLOCK_BYTES * torch.get_num_threads() // (4 * max(1, rows.shape[1]))
    # Whole vectors: torch computes what is left over at the end of a block by other instructions, with other last bits.
    return max(1, count // 64 * 64 or count)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision to compute in: fp32 for what is stored in half of that, else that of the tensor."""
    return torch.float64 if dtype is torch.float64 else torch.float32
