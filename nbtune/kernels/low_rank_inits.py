"""First weights of LoRA for a base weight W [out, in]: A [r, in] and B [out, r].

    A, B = pissa(W, r=16, scaling=2.0)

They are computed and returned in fp32 (fp64 for an fp64 weight) on the weight's device; on the meta device only the
shapes are. PiSSA and OLoRA start with s B A != 0: the adapter then subtracts its start, see `as_plain`, where PEFT
changes the base weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nbtune.errors import AdapterError


def default(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A as nn.Linear's weight, B = 0; those of a convolution are [r, in, k...] and [out, r, 1...]. arXiv:2106.09685."""
    A, B = _empty(weight, r)
    return nn.init.kaiming_uniform_(A, a=math.sqrt(5)), B.zero_()


def gaussian(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A of a normal distribution with the standard deviation 1 / r, B = 0; the shapes of `default`."""
    A, B = _empty(weight, r)
    return nn.init.normal_(A, std=1 / r), B.zero_()


def embedding(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """For an embedding, whose weight is here [dim, vocabulary]: A = 0 and B of a standard normal distribution."""
    A, B = _empty(weight, r)
    return A.zero_(), nn.init.normal_(B)


def orthogonal(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A and B both random, yet B A = 0: they go through two halves of one orthonormal basis of the r dimensions.

    https://datta0.github.io/posts/rethink-lora-init. Raises AdapterError for an odd r.
    """
    if r % 2:
        raise AdapterError("Odd rank", f"The orthogonal init halves the rank, and r is {r}.", "Choose an even r.")
    A, B = _empty(weight, r)
    if weight.is_meta:
        return A, B
    half = {"device": A.device, "dtype": A.dtype}
    basis = torch.linalg.qr(torch.randn(r, r, **half)).Q
    A = basis[0::2].T @ torch.randn(A.shape[1], r // 2, **half).T / 10
    return A.contiguous(), (torch.randn(r // 2, B.shape[0], **half).T @ basis[1::2] / 10).contiguous()


def pissa(weight: Tensor, r: int, scaling: float = 1.0, niter: int | None = None) -> tuple[Tensor, Tensor]:
    """The principal r singular directions: scaling * B @ A is W's best approximation of rank r.

    `niter` takes that many steps of a randomized SVD, which is fast, instead of a full SVD; the same W gives the same
    result. Meng et al. 2024, arXiv:2404.02948. Raises AdapterError where r is more than W's rank can be.
    """
    W = _matrix(weight, r)
    if W.is_meta:
        return _empty(weight, r)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False) if niter is None else randomized_svd(W, r, niter)
    root = (S[:r] / scaling).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def olora(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """B and A are the first columns of Q and rows of R in W = Q R; the scaling is not divided out, as in PEFT.

    Büyükakyüz 2024, arXiv:2406.01775. Raises AdapterError where r is more than W's rank can be.
    """
    W = _matrix(weight, r)
    if W.is_meta:
        return _empty(weight, r)
    Q, R = torch.linalg.qr(W)
    return R[:r].contiguous(), Q[:, :r].contiguous()


def first_weights(init: bool | str, weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B by the name of an init: PEFT's values of init_lora_weights, of which False makes both random."""
    if isinstance(init, str) and init.startswith("pissa"):
        return pissa(weight, r, scaling, int(init.rpartition("_")[2]) if "niter" in init else None)
    named = {"gaussian": gaussian, "orthogonal": orthogonal, "olora": olora}
    A, B = named[init](weight, r) if isinstance(init, str) and init in named else default(weight, r)
    if init is False:
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    return A, B


def as_plain(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """A' [2r, in] and B' [out, 2r] with B' A' = B A - B0 A0: a plain LoRA of rank 2r and the same scaling.

    The same scaling is twice the alpha, or with rsLoRA the square root of two times it.
    """
    return torch.cat([A, A0]), torch.cat([B, -B0], dim=1)


def _empty(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Uninitialised factors for a weight [out, in, ...]."""
    dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
    ones = [1] * (weight.ndim - 2)
    A = torch.empty(r, *weight.shape[1:], dtype=dtype, device=weight.device)
    return A, torch.empty(weight.shape[0], r, *ones, dtype=dtype, device=weight.device)


def _matrix(weight: Tensor, r: int) -> Tensor:
    """The weight to compute with, if it has r directions."""
    if weight.ndim != 2 or r > min(weight.shape):
        message = f"This init takes r directions out of a matrix; r is {r}, the weight {list(weight.shape)}."
        raise AdapterError("The rank does not fit the weight", message, "Lower r, or leave the module out.")
    return weight.detach().to(torch.float64 if weight.dtype is torch.float64 else torch.float32)


def randomized_svd(matrix: Tensor, q: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, q], S [q], Vh [q, n] of a matrix [m, n], about; Halko et al. 2009, arXiv:0909.4061, algorithm 5.1.

    torch.svd_lowrank, but with its own random numbers: always the same, on every device, the global ones left alone.
    """
    if matrix.shape[0] < matrix.shape[1]:
        U, S, Vh = randomized_svd(matrix.T, q, niter)
        return Vh.T, S, U.T
    start = torch.randn(matrix.shape[1], q, dtype=matrix.dtype, generator=torch.Generator().manual_seed(42))
    Q = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
    for _ in range(niter):
        Q = torch.linalg.qr(matrix.T @ Q).Q
        Q = torch.linalg.qr(matrix @ Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    return Q @ U, S, Vh


class InputDirections:
    """The principal directions of a layer's inputs, batch after batch: incremental PCA, Ross et al. 2008."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rows = 0  # of input, so far
        self.converged = torch.zeros(size, dtype=torch.bool)  # the last step turned the direction by no more than tau

    def update(self, x: Tensor, tau: float) -> None:
        """Take in x [rows, in], unless it has fewer rows than there are directions."""
        if len(x) < min(self.size, x.shape[1]):
            return
        mean = x.float().mean(0)
        stack = centred = x.float() - mean
        variance = centred.square().sum()
        if self.rows:
            # The rows before stand in by their directions; the step from their mean to this one is a row of its own.
            share = len(x) / (self.rows + len(x))
            step = math.sqrt(self.rows * share) * (self.mean - mean)
            stack = torch.cat([self.values[:, None] * self.directions, centred, step[None]])
            variance = self.variance + variance + step.square().sum()
            mean = self.mean.lerp(mean, share)
        _, S, Vh = randomized_svd(stack, min(2 * self.size, *stack.shape), niter=4)
        if self.rows:
            self.converged = (torch.cosine_similarity(Vh[: self.size], self.directions).abs() >= tau).cpu()
        self.mean, self.variance, self.rows = mean, variance, self.rows + len(x)
        self.values, self.directions = S[: self.size], Vh[: self.size]  # [size], [size, in]

    def explained(self) -> Tensor:
        """The share of each direction in the variance of the inputs, [size]."""
        return (self.values.square() / self.variance.clamp_min(1e-30)).cpu()
