"""The random matrices of RandLoRA (Albert et al. 2025, arXiv:2502.00987), made on the CPU: the same everywhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def random_bases(r: int, shorter: int, longer: int, seed: int, zeros_per_one: float = 0.0) -> tuple[Tensor, Tensor]:
    """A [r, 1, shorter] and B [longer, ceil(shorter / r), r], each of standard deviation 1.

    In bfloat16, uniform; with `zeros_per_one` in fp32, and -1, 0 and 1 before they are scaled.
    """
    generator, count = torch.Generator("cpu").manual_seed(seed), math.ceil(shorter / r)
    if zeros_per_one:
        A = ternary((r, 1, shorter), zeros_per_one, generator)
        B = ternary((longer, count, r), zeros_per_one, generator)
    else:
        A = _uniform((r, 1, shorter), generator)
        B = torch.cat([_uniform((longer, 1, r), generator) for _ in range(count)], dim=1)
    return A / A.std(), B / B.std()


def ternary(shape: tuple[int, ...], zeros_per_one: float, generator: torch.Generator) -> Tensor:
    """-1 and 1 with a probability of 1 / (2 zeros_per_one) each, else 0."""
    chance = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    return (chance > 1 - 1 / (2 * zeros_per_one)).float() - (chance < 1 / (2 * zeros_per_one)).float()


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    empty = torch.empty(shape, dtype=torch.bfloat16, device="cpu")
    return nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)
