"""The low-rank update y + s B A x of a linear layer's output: by one adapter, or by another one in each row of a batch.

They compute in the precision of x and y, and without gradients they overwrite y, if it is contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nbtune.kernels.casts import cast, joined, keeps_casts
from nbtune.kernels.low_rank import padded


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return y + s B A x for y [..., out], x [..., in], A [r, in] and B [out, r]."""
    # By identity: where there is little to compute, each comparison or cast costs as much as a small kernel on a CPU.
    if A.dtype is not x.dtype:
        A = A.to(x.dtype) if torch.is_grad_enabled() else cast(A, x.dtype)
    if B.dtype is not y.dtype:
        B = B.to(y.dtype) if torch.is_grad_enabled() else cast(B, y.dtype)
    out, r = B.shape
    hidden = F.linear(x, A).reshape(-1, r)  # [tokens, r]
    # addmm scales and accumulates in the matmul itself: no activation-sized product, no separate addition.
    if torch.is_grad_enabled() or not y.is_contiguous():
        return torch.addmm(y.reshape(-1, out), hidden, B.t(), alpha=scaling).view_as(y)
    y.view(-1, out).addmm_(hidden, B.t(), alpha=scaling)
    return y


def add_low_rank_by_row(
    y: Tensor,
    x: Tensor,
    all_A: Sequence[Tensor],
    all_B: Sequence[Tensor],
    scalings: Sequence[float],
    which: Tensor | None = None,
) -> Tensor:
    """The same for y [rows, ..., out] and x [rows, ..., in], in row b with the factors number `which[b]`, or number b.

    Ranks and scalings may differ: short ranks are filled up with zeros.
    """
    if keeps_casts() and not torch.is_grad_enabled() and y.is_contiguous() and x.shape[0] * x.shape[-1] == x.numel():
        return _add_to_tokens(y, x, all_A, all_B, scalings, which)
    rank = max(A.shape[0] for A in all_A)
    all_A = [A if A.shape[0] == rank else padded(A, 0, rank) for A in all_A]
    all_B = [B if B.shape[1] == rank else padded(B, 1, rank) for B in all_B]
    scaling = scalings[0]
    if any(other != scaling for other in scalings):
        all_B, scaling = [other * B for other, B in zip(scalings, all_B, strict=True)], 1.0
    A, B = torch.stack(all_A).to(x.dtype), torch.stack(all_B).to(y.dtype)  # [adapters, r, in], [adapters, out, r]
    if which is not None:
        A, B = A[which], B[which]
    rows, out = y.shape[0], y.shape[-1]
    hidden = torch.bmm(x.reshape(rows, -1, x.shape[-1]), A.mT)  # [rows, tokens, r]
    if torch.is_grad_enabled() or not y.is_contiguous():
        return torch.baddbmm(y.reshape(rows, -1, out), hidden, B.mT, alpha=scaling).view_as(y)
    y.view(rows, -1, out).baddbmm_(hidden, B.mT, alpha=scaling)
    return y


def _add_to_tokens(
    y: Tensor,
    x: Tensor,
    all_A: Sequence[Tensor],
    all_B: Sequence[Tensor],
    scalings: Sequence[float],
    which: Tensor | None,
) -> Tensor:
    """`add_low_rank_by_row` for one token a row, as generation has it, into y.

    Two products with the factors of all adapters, where each row's hidden values but those of its own adapter count
    nothing: less than gathering the factors of each row, which are kept cast and joined.
    """
    A, B = joined(all_A, 0, x.dtype), joined(all_B, 1, y.dtype)  # [R, in], [out, R], R the ranks of all together
    ranks = tuple(A.shape[0] for A in all_A)
    hidden = F.linear(x.view(len(x), -1), A)  # [rows, R]
    hidden *= _own(ranks, tuple(scalings), which, len(x), hidden)
    y.view(len(y), -1).addmm_(hidden, B.t())
    return y


def _own(ranks: tuple[int, ...], scalings: tuple[float, ...], which: Tensor | None, rows: int, like: Tensor) -> Tensor:
    """[rows, R]: the scaling in the places of each row's own adapter, else 0."""
    last = _last_own.get(like.device)
    if last is not None and last[0] == (ranks, scalings, rows, like.dtype) and last[1] is which:
        return last[2]
    numbers = torch.arange(len(ranks), device=like.device)
    sizes = torch.tensor(ranks, device=like.device)
    owner = numbers.repeat_interleave(sizes)  # [R]
    scaling = torch.tensor(scalings, dtype=like.dtype, device=like.device).repeat_interleave(sizes)
    found = (owner == (numbers if which is None else which)[:, None]) * scaling
    _last_own[like.device] = (ranks, scalings, rows, like.dtype), which, found
    return found


# The layers of a model follow one another, and nearly all ask for the same.
_last_own: dict[torch.device, tuple[tuple[Any, ...], Tensor | None, Tensor]] = {}


def row_norms(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The norm of each row of W + s B A, [out], without that matrix: |W|^2 + 2 s W . B A + s^2 |B A|^2."""
    squares = W.square().sum(1) + 2 * scaling * ((W @ A.T) * B).sum(1)
    return (squares + scaling**2 * ((B @ (A @ A.T)) * B).sum(1)).sqrt()
