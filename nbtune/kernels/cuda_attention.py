"""Attention within the segments of a packed row on a CUDA device: torch's flash attention of varying lengths where it
has what a model needs, else its flex attention, whose kernel torch compiles with Triton.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FLASH_HEAD_DIM = 256  # the widest head of FlashAttention 2


def has_flash(query: Tensor, value: Tensor) -> bool:
    """Whether `flash_attention` takes these inputs: 16 bits, heads of one width up to 256, Ampere or later."""
    if query.dtype not in (torch.bfloat16, torch.float16) or not query.is_cuda:
        return False
    width = query.shape[-1]
    fits = width == value.shape[-1] and width <= FLASH_HEAD_DIM and width % 8 == 0
    return fits and torch.cuda.get_device_capability(query.device)[0] >= 8 and _varlen_attention() is not None


def has_flex(query: Tensor) -> bool:
    """Whether `flex_attention` can be compiled for these inputs."""
    return query.is_cuda and query.shape[-1] >= 16 and importlib.util.find_spec("triton") is not None


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Sequence[int],
    *,
    scaling: float | None = None,
    window: int | None = None,
) -> Tensor:
    """`segment_attention.segment_attention` without soft-capping, sinks and prefix."""
    varlen = _varlen_attention()
    assert varlen is not None
    on_device = torch.tensor(borders, dtype=torch.int32).to(query.device, non_blocking=True)
    longest = max(end - start for start, end in itertools.pairwise(borders))
    left = -1 if window is None or window >= longest else window - 1
    by_token = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    output = varlen(
        *by_token, on_device, on_device, longest, longest, scale=scaling, window_size=(left, 0), enable_gqa=True
    )
    return output[None]


def flex_attention(
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
    compiled: bool = True,
) -> Tensor:
    """`segment_attention.segment_attention` by torch's flex attention.

    Uncompiled it builds all T x T scores: only to check it where there is no GPU.
    """
    from torch.nn.attention import flex_attention as flex

    before = 0
    if prefix is not None:
        before = prefix[0].shape[2]
        key, value = torch.cat([prefix[0], key], dim=2), torch.cat([prefix[1], value], dim=2)

    real = type(query) is Tensor  # what is made of a planner's fake tensors is not kept
    mask_of, cap_of = (_block_mask, _cap) if real else (_block_mask.__wrapped__, _cap.__wrapped__)
    attention = _compiled_flex() if compiled else flex.flex_attention
    output, (lse, _) = attention(
        query,
        key,
        value,
        score_mod=None if softcap is None else cap_of(softcap, query.device),
        block_mask=mask_of(tuple(borders), window, before, query.device),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=flex.AuxRequest(lse=sinks is not None),
    )
    if sinks is not None and lse is not None:  # a sink is one more term of the sum that probabilities are divided by
        output = output * torch.sigmoid(lse - sinks[:, None].to(lse.dtype))[..., None].to(output.dtype)
    return output.transpose(1, 2).contiguous()


@functools.cache
def _varlen_attention() -> Callable[..., Any] | None:
    """torch's, where it has windows and grouped queries (in torch 2.12 it does)."""
    from torch.nn.attention.varlen import varlen_attn

    needed = {"window_size", "enable_gqa", "scale"}
    return varlen_attn if needed <= inspect.signature(varlen_attn).parameters.keys() else None


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@functools.lru_cache(maxsize=16)
def _cap(softcap: float, device: torch.device) -> Callable[..., Tensor]:
    # Flex attention's compiler takes tensors from outside, but no floats.
    bound = torch.tensor(softcap, dtype=torch.float32, device=device)

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return bound * torch.tanh(score / bound)

    return cap


@functools.lru_cache(maxsize=16)  # all layers of a model see the same row
def _block_mask(borders: tuple[int, ...], window: int | None, before: int, device: torch.device) -> Any:
    """Blocks of 128 queries and keys that see some of each other; keys are those of a prefix, then those of the row."""
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = borders[-1]
    lengths = torch.tensor(borders, device=device).diff()
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    starts = torch.tensor(borders[:-1], device=device)[segment]
    position = torch.arange(tokens, device=device) - starts + before
    key_segment = torch.cat([segment.new_full((before,), -1), segment])
    key_position = torch.cat([torch.arange(before, device=device), position])

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = position[query] - key_position[key]
        same = (segment[query] == key_segment[key]) | (key_segment[key] < 0)
        near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return same & near

    return create_block_mask(sees, None, None, tokens, before + tokens, device=device)
