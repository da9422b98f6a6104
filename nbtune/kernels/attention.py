"""Attention over packed examples: each segment of a flat row sees only itself.

A packed row is [1, T] with `cu_seq_lens_q` saying where its examples begin. Looping over the segments keeps the cost at
the sum of their squares; a T x T block mask costs the square of their sum, 5 to 13 times more at T = 2,048 on a CPU.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from nbtune.errors import ModelError

NAME = "nbtune_packed"  # the value of `attn_implementation`


def register() -> None:
    """Make the attention known to transformers under `NAME`, through its own registry. Safe to call again."""
    from nbtune._transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention within each segment, in the form transformers calls.

    Args:
        module: The attention module; only named in errors.
        query: Queries [1, heads, T, head_dim]; `key` and `value` may have fewer heads (grouped-query attention).
        key: Keys [1, kv_heads, T, head_dim].
        value: Values [1, kv_heads, T, head_dim].
        attention_mask: Must be None: the segments are the mask.
        scaling: Factor on the scores; None is 1 / sqrt(head_dim).
        dropout: Probability of dropping an attention weight.
        sliding_window: A token sees itself and the `sliding_window - 1` before it.
        softcap: Not computed here; refused.
        s_aux: Attention sinks; not computed here; refused.
        cu_seq_lens_q: Segment borders [segments + 1], int32, from 0 to T.

    Returns:
        The outputs [1, T, heads, head_dim], and None for the weights.
    """
    if softcap is not None or s_aux is not None:
        feature = "soft-capped scores" if softcap is not None else "attention sinks"
        raise ModelError("This model's attention is not supported", f"{type(module).__name__} uses {feature}.")
    if cu_seq_lens_q is None or attention_mask is not None:
        raise ModelError(
            "Packed attention was called without segments",
            f"{type(module).__name__} is set to {NAME!r}, which trains on packed rows and needs `cu_seq_lens_q`.",
            "To generate, load the model again or call `model.set_attn_implementation('sdpa')`.",
        )

    borders = cu_seq_lens_q.tolist()
    grouped = key.shape[1] != query.shape[1]
    outputs = []
    for start, end in itertools.pairwise(borders):
        q, k, v = query[:, :, start:end], key[:, :, start:end], value[:, :, start:end]
        mask = _window_mask(end - start, sliding_window, query.device)
        outputs.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """The mask of a sliding window [length, length], or None where the window covers the whole segment."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)
