"""LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models. Li et al. 2023, arXiv:2310.08659.

The first weights of a low-rank adapter that make up for what quantising the base loses: Q + B A is close to W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbtune.errors import AdapterError
from nbtune.modules.quantised import bitsandbytes, dequantised


def quantise_4bit(
    weight: Tensor, quant_type: str = "nf4", block_size: int = 64, *, double_quant: bool = False
) -> Tensor:
    """`weight` in its own precision, after quantising it to 4 bits (`nf4` or `fp4`) and back."""
    functional = bitsandbytes().functional
    settings = {"blocksize": block_size, "compress_statistics": double_quant, "quant_type": quant_type}
    # Flat: bitsandbytes 0.50 on a CPU misplaces the scales of a matrix whose rows are no whole number of blocks.
    codes, state = functional.quantize_4bit(weight.float().reshape(-1), **settings)
    return functional.dequantize_4bit(codes, state).view(weight.shape).to(weight.dtype)


def _quantise_8bit(weight: Tensor) -> Tensor:
    functional = bitsandbytes().functional
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    return functional.int8_vectorwise_dequant(codes, scales)


@torch.no_grad()
def loftq(weight: Tensor, bits: int, rank: int, iterations: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(quantised weight [out, in], A [rank, in], B [out, rank]), found in turns so that their sum Q + B A is near W.

    The quantised weight is in floats of `weight`'s precision, for a base that stays 16-bit but will be quantised by the
    same code (4 bits: nf4); A and B are fp32 and stand for a scaling of 1. Raises AdapterError for other bits than 4
    and 8, fewer iterations than 1, and a rank that the weight does not have.
    """
    if bits not in (4, 8):
        raise AdapterError("LoftQ quantises to 4 or 8 bits", f"loftq_bits is {bits}.")
    if iterations < 1:
        raise AdapterError("LoftQ needs an iteration", f"loftq_iter is {iterations}.", "Give 1 or more.")
    exact = weight.float()
    quantise = quantise_4bit if bits == 4 else _quantise_8bit
    quantised = quantise(exact)
    A, B = _factors(exact - quantised, rank)
    for _ in range(iterations - 1):
        quantised = quantise(exact - B @ A)
        A, B = _factors(exact - quantised, rank)
    return quantised.to(weight.dtype), A, B


@torch.no_grad()
def loftq_of_base(weight: Tensor, module: Any, rank: int) -> tuple[Tensor, Tensor]:
    """(A [rank, in], B [out, rank]) for a base that is quantised already; `weight` [out, in] is what it was before.

    One step of LoftQ: B A is the best approximation of what quantising lost.
    """
    return _factors(weight.float() - dequantised(module, torch.float32), rank)


def _factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of the best approximation B A of that rank, with the singular values shared between them."""
    if rank > min(matrix.shape):
        message = f"The rank is {rank}, the weight {list(matrix.shape)}."
        raise AdapterError("LoftQ has no such rank", message, f"Give {min(matrix.shape)} or less.")
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * V[:rank], U[:, :rank] * root
