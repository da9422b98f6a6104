"""Matrices M [out, in] of a structure, and products x M^T for x [..., in] that do without M.

x has the precision of M's parts, unless said otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def kronecker_product(x: Tensor, left: Tensor, *right: Tensor) -> Tensor:
    """Return x (L (x) R)^T [..., a b] for x [..., c d], L [a, c] and R [b, d], or factors of R, [b, r] and [r, d].

    (L (x) R) x is L X R^T, for x as a matrix X [c, d].
    """
    a, c = left.shape
    hidden = x.reshape(-1, x.shape[-1] // c)  # [tokens c, d]
    for factor in reversed(right):
        hidden = F.linear(hidden, factor)
    b = hidden.shape[-1]
    return torch.einsum("ac,tcb->tab", left, hidden.view(-1, c, b)).reshape(*x.shape[:-1], a * b)


def hadamard_product(x: Tensor, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> Tensor:
    """Return x ((A1 B1) * (A2 B2))^T [..., out] for A1, A2 [out, r] and B1, B2 [r, in]; * by element.

    M has a rank of up to r^2 and is itself low-rank: its factors are the products of all pairs of columns of A1 and A2,
    and of all pairs of rows of B1 and B2. Where M is smaller than these, M is formed. Both are cast to x's precision.
    """
    (out, r), inner = A1.shape, x.shape[-1]
    if r * r * (out + inner) >= out * inner:
        return F.linear(x, ((A1 @ B1) * (A2 @ B2)).to(x.dtype))
    down = (B1[:, None] * B2).flatten(0, 1)  # [r r, in]
    up = (A1[:, :, None] * A2[:, None]).flatten(1)  # [out, r r]
    return F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


def tucker_product(core: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The tensor [out, in, *kernel] of a core [r, r, *kernel], rows [r, out] and columns [r, in]."""
    return torch.einsum("ij...,ip,jq->pq...", core, rows, columns)


def circulant(kernels: Tensor) -> Tensor:
    """The matrix [m b, n b] of circulant blocks, D[i, j] = k[(j - i) mod b], for kernels k [m, n, b]."""
    at = torch.arange(kernels.shape[-1], device=kernels.device)
    blocks = kernels[..., (at - at[:, None]) % len(at)]  # [m, n, i, j]
    return blocks.transpose(1, 2).flatten(2).flatten(0, 1)


def circulant_product(x: Tensor, kernels: Tensor) -> Tensor:
    """Return x `circulant(k)`^T [..., m b] for x [..., n b]: F^-1(F(x) * conj(F(k))), F a Fourier transform."""
    size = kernels.shape[-1]
    x_hat = torch.fft.rfft(x.unflatten(-1, (-1, size)))  # [..., n, b / 2 + 1]
    y_hat = torch.einsum("...nf,mnf->...mf", x_hat, torch.fft.rfft(kernels).conj())
    return torch.fft.irfft(y_hat, n=size).flatten(-2)


def granular(A: Tensor, B: Tensor) -> Tensor:
    """The matrix [out, in] of k x k blocks B_mn A_mn of rank r / k, for A [k, in / k, r] and B [k, r, out / k].

    A[n] holds A_mn at its r / k columns number m, B[m] holds B_mn at its r / k rows number n.
    """
    A, B = A.unflatten(-1, (len(B), -1)), B.unflatten(1, (len(B), -1))  # [n, i, m, s], [m, n, s, o]
    return torch.einsum("nims,mnso->moni", A, B).flatten(2).flatten(0, 1)


def granular_product(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return x `granular(A, B)`^T [..., out] for x [..., in]."""
    k = B.shape[0]
    hidden = torch.einsum("...ni,nir->...nr", x.unflatten(-1, (k, -1)), A)
    hidden = hidden.unflatten(-1, (k, -1)).transpose(-3, -2).flatten(-2)  # [..., m, (n, r / k)]
    return torch.einsum("...mr,mro->...mo", hidden, B).flatten(-2)
