"""Loss, correctness, entropy and gradient of rows of logits: a program reads a row twice and writes it once, in place.

The first pass keeps the largest logit so far and sums relative to it, rescaled whenever it grows (arXiv:1805.02867).
"""

# Triton types a kernel's parameters as if a launch took constexprs and no options.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nbtune.kernels.triton import launches

TILE = 4096  # columns at a time
WARPS = 8


def cross_entropy(
    product: Tensor, labels: Tensor, *, scale: float, softcap: float | None, smoothing: float, gradient: Tensor | None
) -> Tensor:
    """Loss, correct rows and entropy (nats), summed over the rows of a chunk: [3], fp32.

    Args:
        product: What the head gives [C, V], any strides. The logits are `product * scale`, then soft-capped.
        labels: The target of each row [C], from 0 to V - 1.
        scale: Factor on the product.
        softcap: `softcap * tanh(logits / softcap)` is taken for the logits.
        smoothing: Share of the target that all V words have alike.
        gradient: Becomes the gradient of the summed loss by the scaled product [C, V], any strides (so it lacks the
            factor `scale`); may be `product` itself.
    """
    rows, vocabulary = product.shape
    sums = torch.empty(rows, 3, dtype=torch.float32, device=product.device)
    if launches(product):
        _cross_entropy[(rows,)](
            product,
            labels,
            sums,
            gradient,
            vocabulary,
            *product.stride(),
            *((0, 1) if gradient is None else gradient.stride()),
            scale,
            0.0 if softcap is None else softcap,
            smoothing,
            HAS_CAP=softcap is not None,
            TILE=min(TILE, triton.next_power_of_2(vocabulary)),
            num_warps=WARPS,
        )
    return sums.sum(0)


@triton.jit
def _logits(product, stride, column, vocabulary, scale, softcap, HAS_CAP: tl.constexpr):
    """The logits of some columns in fp32, -inf past the vocabulary."""
    logits = tl.load(product + column.to(tl.int64) * stride, mask=column < vocabulary, other=0.0).to(tl.float32) * scale
    if HAS_CAP:
        decay = tl.exp(-2 * tl.abs(logits) / softcap)  # tanh |x| = (1 - exp(-2 |x|)) / (1 + exp(-2 |x|))
        capped = softcap * (1 - decay) / (1 + decay)
        logits = tl.where(logits < 0, -capped, capped)
    return tl.where(column < vocabulary, logits, float("-inf"))


@triton.jit
def _cross_entropy(
    product,
    labels,
    sums,
    gradient,
    vocabulary,
    product_row,
    product_column,
    gradient_row,
    gradient_column,
    scale,
    softcap,
    smoothing,
    HAS_CAP: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    product += row * product_row
    label = tl.load(labels + row)

    largest = tl.full((), float("-inf"), tl.float32)
    best = tl.full((), 0, tl.int32)
    weight = tl.full((), 0.0, tl.float32)  # sum of exp(logit - largest)
    weighted = tl.full((), 0.0, tl.float32)  # sum of exp(logit - largest) (logit - largest)
    total = tl.full((), 0.0, tl.float32)
    expected = tl.full((), 0.0, tl.float32)
    for start in range(0, vocabulary, TILE):
        column = start + tl.arange(0, TILE)
        exists = column < vocabulary
        logits = _logits(product, product_column, column, vocabulary, scale, softcap, HAS_CAP)
        peak, peak_column = tl.max(logits, 0, return_indices=True)
        best = tl.where(peak > largest, start + peak_column, best)
        rise = tl.where(start > 0, tl.maximum(peak - largest, 0.0), 0.0)
        largest = tl.maximum(largest, peak)
        shrink = tl.exp(-rise)
        weighted = shrink * (weighted - weight * rise)
        distance = tl.where(exists, logits - largest, 0.0)
        weights = tl.where(exists, tl.exp(distance), 0.0)
        weight = shrink * weight + tl.sum(weights, 0)
        weighted += tl.sum(weights * distance, 0)
        total += tl.sum(tl.where(exists, logits, 0.0), 0)
        expected += tl.sum(tl.where(column == label, logits, 0.0), 0)

    logarithm = tl.log(weight)
    # Relative to the largest, as all else: far from zero their difference would lose its digits.
    expected = (1 - smoothing) * (expected - largest) + smoothing * (total / vocabulary - largest)
    tl.store(sums + row * 3, logarithm - expected)
    tl.store(sums + row * 3 + 1, (best == label).to(tl.float32))
    tl.store(sums + row * 3 + 2, logarithm - weighted / weight)

    if gradient is not None:
        gradient += row * gradient_row
        for start in range(0, vocabulary, TILE):
            column = start + tl.arange(0, TILE)
            logits = _logits(product, product_column, column, vocabulary, scale, softcap, HAS_CAP)
            slope = tl.exp(logits - largest) / weight - smoothing / vocabulary
            slope -= tl.where(column == label, 1 - smoothing, 0.0)
            if HAS_CAP:
                slope *= 1 - (logits / softcap) * (logits / softcap)
            target = gradient + column.to(tl.int64) * gradient_column
            tl.store(target, slope.to(gradient.dtype.element_ty), mask=column < vocabulary)
