"""Attention over packed examples: each segment of a flat row sees only itself.

A packed row is [1, T] with `cu_seq_lens_q` saying where its examples begin. Looping over the segments keeps the cost at
the sum of their squares; a T x T block mask costs the square of their sum, 5 to 13 times more at T = 2,048 on a CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

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
    prefix: Sequence[tuple[Tensor, Tensor]] | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention within each segment, in the form transformers calls.

    Args:
        module: The attention module; its layer_idx says which layer's prefix to take.
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
        prefix: For each layer keys and values [1, kv_heads, P, head_dim] that stand before every segment: tokens of
            all segments see them (prefix tuning).

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
    before = None
    if prefix is not None:
        before = [tensor.to(key.dtype) for tensor in prefix[int(module.layer_idx)]]  # pyright: ignore[reportArgumentType]
    for start, end in itertools.pairwise(borders):
        q, k, v = query[:, :, start:end], key[:, :, start:end], value[:, :, start:end]
        if before is not None:
            k, v = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
        mask = _mask(end - start, k.shape[2], sliding_window, query.device)
        outputs.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """The causal mask [queries, keys] of the last queries, or None where it is the plain one without a window."""
    if queries == keys and (window is None or keys <= window):
        return None
    position = torch.arange(keys, device=device)
    distance = position[keys - queries :, None] - position[None, :]
    return (distance >= 0) & (distance < (window or keys))
