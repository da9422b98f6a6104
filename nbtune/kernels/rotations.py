"""Rotations R of vectors x [..., n], by what is trained of them: x R is computed without R [n, n].

They compute in the precision of what is trained, and return x R in that of x.
"""

from __future__ import annotations

import torch
from torch import Tensor


def skew_symmetric(entries: Tensor, size: int) -> Tensor:
    """Q = -Q^T [blocks, b, b] from its entries above the diagonal, row by row, [blocks, b (b - 1) / 2]."""
    row, column = torch.triu_indices(size, size, 1, device=entries.device)
    above = entries.new_zeros(len(entries), size * size)
    above = above.scatter(1, (row * size + column).expand_as(entries), entries).unflatten(1, (size, size))
    return above - above.mT


def cayley(Q: Tensor) -> Tensor:
    """The rotations (I - Q)(I + Q)^-1 for skew-symmetric Q [..., b, b]."""
    one = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return torch.linalg.solve(one + Q, one - Q, left=False)


def cayley_series(Q: Tensor, terms: int) -> Tensor:
    """I + 2 Q + ... + 2 Q^(n - 2) + Q^(n - 1) for Q [..., b, b] and n terms, about (I + Q)(I - Q)^-1 for small Q.

    Three terms are four, as in PEFT. Qiu et al. 2025, arXiv:2506.19847.
    """
    total = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device) + 2 * Q
    power = Q
    if terms > 2:
        for _ in range(2, max(terms - 1, 3)):
            power = power @ Q
            total = total + 2 * power
        total = total + power @ Q
    return total


def rotated_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Return x R for x [..., n] and the blocks [n / b, b, b] on the diagonal of R."""
    parts = x.to(blocks.dtype).unflatten(-1, blocks.shape[:2])
    return torch.einsum("...nk,nkc->...nc", parts, blocks).flatten(-2).to(x.dtype)


def butterfly(x: Tensor, blocks: Tensor, *, transposed: bool = False) -> Tensor:
    """Return x B_m ... B_1, or x B_1^T ... B_m^T, for x [..., n] and the blocks [m, n / b, b, b] of the m factors.

    Factor i is block-diagonal once its inputs are permuted: within every 2^(i - 1) blocks, the even half-blocks come
    before the odd ones. Liu et al. 2023, arXiv:2311.06243.
    """
    half = blocks.shape[-1] // 2
    factors = list(enumerate(blocks.mT if transposed else blocks))
    for number, factor in factors if transposed else reversed(factors):
        if number == 0:
            x = rotated_blocks(x, factor)
            continue
        x = x.unflatten(-1, (-1, 2, 2**number, half)).transpose(-3, -2).flatten(-4)
        x = rotated_blocks(x, factor)
        x = x.unflatten(-1, (-1, 2**number, 2, half)).transpose(-3, -2).flatten(-4)
    return x


def reflected(x: Tensor, u: Tensor, *, transposed: bool = False, orthogonal: bool = False) -> Tensor:
    """Return x H_r ... H_1, or transposed x H_1 ... H_r, for x [..., n]; H_i = I - 2 u_i u_i^T / |u_i|^2, u [n, r].

    The product of the reflections is I - U T U^T with an upper triangular T [r, r], T^-1 having the upper triangle of
    U^T U and 1/2 on its diagonal (Joffrain et al. 2006). `orthogonal` takes the u_i after Gram-Schmidt; T then is 2 I.
    """
    if orthogonal:
        U = torch.linalg.qr(u).Q
        right = 2 * U.mT  # T U^T [r, n]
    else:
        U = u / u.norm(dim=0)
        inner = (U.mT @ U).triu(1) + 0.5 * torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
        right = torch.linalg.solve_triangular(inner if transposed else inner.mT, U.mT, upper=transposed)
    exact = x.to(U.dtype)
    return (exact - exact @ U @ right).to(x.dtype)


def rotated_pairs(y: Tensor, angles: Tensor, scales: Tensor, group: int) -> Tensor:
    """R y for y [..., n]: in each group of features, one of the first half turns with its partner in the second.

        y_i' = a_i cos(t_i) y_i - b_i sin(u_i) y_j        y_j' = a_j cos(t_j) y_j + b_j sin(u_j) y_i

    `angles` and `scales` are [n / 2], one of each per pair (t and u, a and b the same), [n], one per feature, or [2 n],
    those with cos and those with sin, group by group. Liao and Monz 2024, arXiv:2409.00119.
    """
    angles, scales = (entries.view(y.shape[-1] // group, -1, group // 2) for entries in (angles, scales))
    along = scales[:, :2] * angles[:, :2].cos()  # [groups, 1 or 2, group / 2]
    across = scales[:, -2:] * angles[:, -2:].sin()
    parts = y.to(angles.dtype).unflatten(-1, (-1, 2, group // 2))
    first, second = parts.unbind(-2)
    return (along * parts + across * torch.stack([-second, first], dim=-2)).flatten(-3).to(y.dtype)


def dropped_blocks(blocks: Tensor, p: float) -> Tensor:
    """Blocks [factors, n, b, b] with a share p of those of one factor, drawn at random, replaced by the identity."""
    factors, n, size, _ = blocks.shape
    # Drawn as PEFT draws, and on the CPU, so that a seed means the same blocks there, here, and on every device.
    factor = torch.arange(factors) == (torch.randint(0, factors, (1,)) if factors > 1 else 0)
    out = factor[:, None] & (torch.randperm(n) < int(p * n))
    one = torch.eye(size, dtype=blocks.dtype, device=blocks.device)
    return torch.where(out.to(blocks.device)[..., None, None], one, blocks)
