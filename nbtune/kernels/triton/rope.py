"""The Triton twin of `kernels/rope.py`: a program turns the heads of one token, which share its angles."""

# Triton types a kernel's parameters as if a launch took constexprs and no options.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nbtune.kernels.triton import launches

TILE_ELEMENTS = 1024  # pairs of one program


def rotate(x: Tensor, cos: Tensor, sin: Tensor, half: int, *, layout: str, inverse: bool, out: Tensor) -> None:
    """Turn the first 2 `half` features of x [B, heads, T, head_dim] into `out`, any strides; it may be x itself.

    `cos` and `sin` [B or 1, T, R, or R/2 where they are given once], `layout` and `inverse` are those of `rope.rotate`.
    """
    batch, heads, tokens, _ = x.shape
    tile = triton.next_power_of_2(half)
    tile_heads = min(triton.next_power_of_2(heads), max(1, TILE_ELEMENTS // tile))
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    if launches(x):
        _rotate[(batch * tokens, triton.cdiv(heads, tile_heads))](
            x,
            cos,
            sin,
            out,
            heads,
            tokens,
            half,
            *x.stride(),
            *out.stride(),
            cos.stride(0) if cos.shape[0] > 1 else 0,
            cos.stride(1),
            cos.stride(2),
            LAYOUT=layout,
            INVERSE=inverse,
            TILE_HEADS=tile_heads,
            TILE=tile,
        )


@triton.jit
def _rotate(
    x,
    cos,
    sin,
    out,
    heads,
    tokens,
    half,
    x_batch,
    x_head,
    x_token,
    x_feature,
    out_batch,
    out_head,
    out_token,
    out_feature,
    angle_batch,
    angle_token,
    angle_feature,
    LAYOUT: tl.constexpr,
    INVERSE: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    batch = program // tokens
    token = program % tokens
    head = tl.program_id(1).to(tl.int64) * TILE_HEADS + tl.arange(0, TILE_HEADS)
    pair = tl.arange(0, TILE)
    exists = pair < half
    mask = (head < heads)[:, None] & exists[None, :]
    if LAYOUT == "half" or LAYOUT == "half_once":
        first, second = pair, pair + half
    else:
        first, second = 2 * pair, 2 * pair + 1
    if LAYOUT == "half":
        first_angle, second_angle = first, second
    elif LAYOUT == "interleaved":
        first_angle, second_angle = first, first
    else:
        first_angle, second_angle = pair, pair

    angle = batch * angle_batch + token * angle_token
    first_angle = angle + first_angle * angle_feature
    second_angle = angle + second_angle * angle_feature
    first_cos = tl.load(cos + first_angle, mask=exists, other=0.0).to(tl.float32)[None, :]
    second_cos = tl.load(cos + second_angle, mask=exists, other=0.0).to(tl.float32)[None, :]
    first_sin = tl.load(sin + first_angle, mask=exists, other=0.0).to(tl.float32)[None, :]
    second_sin = tl.load(sin + second_angle, mask=exists, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        first_sin, second_sin = -second_sin, -first_sin

    source = x + batch * x_batch + token * x_token + head[:, None] * x_head
    target = out + batch * out_batch + token * out_token + head[:, None] * out_head
    a = tl.load(source + first[None, :] * x_feature, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + second[None, :] * x_feature, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(target + first[None, :] * out_feature, (a * first_cos - b * first_sin).to(dtype), mask=mask)
    tl.store(target + second[None, :] * out_feature, (b * second_cos + a * second_sin).to(dtype), mask=mask)
