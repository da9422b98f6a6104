"""The low-rank update y + s B A x of a linear layer's output: by one adapter, or by another one in each row of a batch.

They compute in the precision of x and y, and without gradients they overwrite y, if it is contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nbtune.kernels.casts import joined, keeps_casts, kept
from nbtune.kernels.low_rank import padded

_FEW_TOKENS = 16


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return y + s B A x for y [..., out], x [..., in], A [r, in] and B [out, r]."""
    # By identity: where there is little to compute, each comparison or cast costs as much as a small kernel on a CPU.
    if not torch.is_grad_enabled() and y.is_contiguous() and _few(x):
        hidden = F.linear(x.float(), A.float())  # they mostly are in fp32 already
        return y.add_(F.linear(hidden, B.float()).view_as(y), alpha=scaling)
    if A.dtype is not x.dtype:
        A = A.to(x.dtype)
    if B.dtype is not y.dtype:
        B = B.to(y.dtype)
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


def _few(x: Tensor) -> bool:
    """Whether x [..., in] in bf16 is better computed in fp32.

    On a CPU a small product in bf16 costs oneDNN 20 to 40 microseconds, whatever its size; one in fp32 costs 4 to 15.
    """
    return x.device.type == "cpu" and x.dtype is torch.bfloat16 and x.numel() <= _FEW_TOKENS * x.shape[-1]


def a_token_each(y: Tensor, x: Tensor) -> bool:
    """Whether `add_to_tokens` serves: an answer is written, a token a row, and the factors are kept cast meanwhile."""
    one = x.shape[0] * x.shape[-1] == x.numel()
    return one and keeps_casts() and not torch.is_grad_enabled() and y.is_contiguous()


def add_to_tokens(
    y: Tensor, x: Tensor, all_A: Sequence[Tensor], all_B: Sequence[Tensor], scalings: Sequence[float], which: Tensor
) -> Tensor:
    """`add_low_rank_by_row` for one token a row, into y, with parameters as factors; a row of -1 gets nothing.

    Two products with the factors of all adapters, where each row's hidden values but those of its own adapter count
    nothing: less than gathering the factors of each row, as they are kept cast and joined.
    """
    dtype = torch.float32 if _few(x) else x.dtype
    A, B = joined(all_A, 0, dtype), joined(all_B, 1, dtype, scalings)  # [R, in], [out, R], R the ranks of all together
    hidden = F.linear(x.view(len(x), -1).to(dtype), A)  # [rows, R]
    ranks = tuple(A.shape[0] for A in all_A)
    hidden *= kept((ranks, dtype), [which], lambda: _own(ranks, which, hidden))
    y.view(len(y), -1).add_(F.linear(hidden, B))
    return y


def _own(ranks: tuple[int, ...], which: Tensor, like: Tensor) -> Tensor:
    """1 in the places of each row's own adapter, else 0: [rows, R]."""
    numbers = torch.arange(len(ranks), device=like.device)
    owner = numbers.repeat_interleave(torch.tensor(ranks, device=like.device))  # [R]
    return (owner == which[:, None]).to(like.dtype)


def row_norms(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The norm of each row of W + s B A, [out], without that matrix: |W|^2 + 2 s W . B A + s^2 |B A|^2."""
    squares = W.square().sum(1) + 2 * scaling * ((W @ A.T) * B).sum(1)
    return (squares + scaling**2 * ((B @ (A @ A.T)) * B).sum(1)).sqrt()
