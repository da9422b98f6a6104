"""Attention of one new token to a cache, on a CPU: heads that share keys and values read them once.

PyTorch's grouped attention gives every query head a pass of its own over the keys that it shares with others.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from nbtune._transformers import AttentionInterface, PreTrainedModel

NAME = "nbtune_grouped"  # the value of `attn_implementation`


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Have a model on a CPU that computes attention with PyTorch's `sdpa` do it so. Others stay as they are."""
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as transformers' `sdpa`: query [B, H, Q, D], key and value [B, H / groups, T, D] to [B, Q, H, D].

    The heads of a group become the queries of one head. With a mask `sdpa` does that itself.
    """
    groups = query.shape[1] // key.shape[1]
    if query.shape[2] > 1 or groups == 1 or attention_mask is not None or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    grouped = query.reshape(query.shape[0], key.shape[1], groups, -1)  # [B, H / groups, groups, D]
    y = scaled_dot_product_attention(grouped, key, value, scale=kwargs.get("scaling"))
    return y.reshape(query.shape[0], 1, query.shape[1], -1), None
