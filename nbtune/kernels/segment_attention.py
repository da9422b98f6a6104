"""Exact causal attention within the segments of a packed row, by plain matrix products and a softmax.

torch's flash attention for CPUs is slow for short segments, above all in its backward pass. Here segments of like
length are one batch (padding at their ends is never seen by a real token, for attention is causal), the query heads
that share a key head are rows of one matrix, and queries come in blocks, which are multiplied only with keys they may
see. Besides inputs and outputs one number a row is kept for the backward pass, the logarithm of the sum of its
exponentials, and the probabilities are made again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nbtune.kernels.segment_blocks import BlockedAttention, Options


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Sequence[int],
    *,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention in which each segment of a packed row sees only itself.

    Args:
        query: Queries [1, heads, T, head_dim], of any strides; usually a view of [T, heads * head_dim].
        key: Keys [1, kv_heads, T, head_dim]; kv_heads divides heads.
        value: Values [1, kv_heads, T, value_dim].
        borders: Where segments begin and end, from 0 to T: segment i is tokens borders[i] to borders[i + 1].
        scaling: Factor on the scores; None is 1 / sqrt(head_dim).
        window: A token sees itself and the `window - 1` before it; None is all before it.
        softcap: Gemma 2's `softcap * tanh(scores / softcap)` (arXiv:2408.00118), after `scaling`.
        sinks: For each head [heads] a score that takes its share of the softmax and has no value (gpt-oss).
        prefix: Keys [1, kv_heads, P, head_dim] and values [1, kv_heads, P, value_dim] that stand before every segment.

    Returns:
        The outputs [1, T, heads, value_dim], contiguous. Gradients of query, key and value have the memory order
        [T, heads, head_dim], so that going back to [T, heads * head_dim] copies nothing.
    """
    options = Options(tuple(borders), scaling or 1 / math.sqrt(query.shape[-1]), window, softcap)
    return _SegmentAttention.apply(query, key, value, sinks, *(prefix or (None, None)), options)


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, prefix_key, prefix_value, options):  # noqa: ANN001, ANN205
        output, logsumexp = BlockedAttention(query, key, value, sinks, prefix_key, prefix_value, options).forward()
        ctx.save_for_backward(query, key, value, sinks, prefix_key, prefix_value, output, logsumexp)
        ctx.options = options
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # noqa: ANN001, ANN205 # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, sinks, prefix_key, prefix_value, output, logsumexp = ctx.saved_tensors
        attention = BlockedAttention(query, key, value, sinks, prefix_key, prefix_value, ctx.options)
        return *attention.backward(grad, output, logsumexp), None
