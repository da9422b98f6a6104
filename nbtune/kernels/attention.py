"""Attention over packed examples: each segment of a flat row sees only itself.

A packed row is [1, T] with `cu_seq_lens_q` saying where its examples begin. Its cost is the sum of their squares; a T x
T block mask costs the square of their sum, 5 to 13 times more at T = 2,048 on a CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from nbtune.errors import ModelError
from nbtune.kernels import cuda_attention
from nbtune.kernels.segment_attention import segment_attention

NAME = "nbtune_packed"  # the value of `attn_implementation`


def register() -> None:
    """Make the attention known to transformers under `NAME`, through its own registry. Safe to call again."""
    from nbtune._transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def segment_arguments(borders: Tensor, longest: int) -> dict[str, Tensor | int]:
    """How transformers hands a packed row's segments to an attention: `borders` [segments + 1], and the longest."""
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}


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
        softcap: Bound of the scores (Gemma 2).
        s_aux: Attention sinks [heads] (gpt-oss).
        cu_seq_lens_q: Segment borders [segments + 1], int32, from 0 to T.
        prefix: For each layer keys and values [1, kv_heads, P, head_dim] that stand before every segment: tokens of
            all segments see them (prefix tuning).

    Returns:
        The outputs [1, T, heads, head_dim], and None for the weights.

    Raises:
        ModelError: Without segments, or for a dropout together with `softcap` or `s_aux`.
    """
    if cu_seq_lens_q is None or attention_mask is not None:
        raise ModelError(
            "Packed attention was called without segments",
            f"{type(module).__name__} is set to {NAME!r}, which trains on packed rows and needs `cu_seq_lens_q`.",
            "To generate, load the model again or call `model.set_attn_implementation('sdpa')`.",
        )
    borders = cu_seq_lens_q.tolist()
    before = None
    if prefix is not None:
        keys, values = prefix[int(module.layer_idx)]  # pyright: ignore[reportArgumentType]
        before = keys.to(key.dtype), values.to(value.dtype)
    if dropout > 0:
        if softcap is not None or s_aux is not None:
            feature = "soft-capped scores" if softcap is not None else "attention sinks"
            message = f"{type(module).__name__} has {feature}, and its configuration asks for a dropout of {dropout}."
            raise ModelError("No attention dropout for this model", message, "Set `attention_dropout` to 0.")
        return _with_dropout(query, key, value, borders, scaling, dropout, sliding_window, before), None
    return row_attention(
        query,
        key,
        value,
        borders,
        scaling=scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        prefix=before,
    ), None


def row_attention(
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
    """`segment_attention` with these arguments, by the kernel that suits the device.

    On a CUDA device flash attention; flex attention for what it has not (soft-capping, sinks, a prefix, fp32); and
    where Triton is missing, as on a CPU, `segment_attention` itself.
    """
    if not (softcap or sinks is not None or prefix is not None) and cuda_attention.has_flash(query, value):
        return cuda_attention.flash_attention(query, key, value, borders, scaling=scaling, window=window)
    attention = cuda_attention.flex_attention if cuda_attention.has_flex(query) else segment_attention
    return attention(
        query, key, value, borders, scaling=scaling, window=window, softcap=softcap, sinks=sinks, prefix=prefix
    )


def _with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Sequence[int],
    scaling: float | None,
    dropout: float,
    window: int | None,
    prefix: tuple[Tensor, Tensor] | None,
) -> Tensor:
    grouped = key.shape[1] != query.shape[1]
    outputs = []
    for start, end in itertools.pairwise(borders):
        q, k, v = query[:, :, start:end], key[:, :, start:end], value[:, :, start:end]
        if prefix is not None:
            k, v = torch.cat([prefix[0], k], dim=2), torch.cat([prefix[1], v], dim=2)
        mask = _mask(end - start, k.shape[2], window, query.device)
        outputs.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """The causal mask [queries, keys] of the last queries, or None where it is the plain one without a window."""
    if queries == keys and (window is None or keys <= window):
        return None
    position = torch.arange(keys, device=device)
    distance = position[keys - queries :, None] - position[None, :]
    return (distance >= 0) & (distance < (window or keys))
