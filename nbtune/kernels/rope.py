"""Rotary position embeddings (arXiv:2104.09864): pairs of features are turned by an angle that grows with the position.

The rotation is linear in its input: only the angles are saved, and the gradient is turned back by the same angles.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from nbtune.kernels.row_blocks import compute_dtype
from nbtune.kernels.triton import use_triton

# Pairs of features and the place of their angle: "half": i and i + R/2, angle i, which is also angle i + R/2 (Llama).
# "interleaved": 2i and 2i + 1, angle 2i (Cohere). "interleaved_first": 2i and 2i + 1, angle i (GLM, Ernie, Helium).
# "half_once": as "half", but each angle is given once, so that R is up to twice their number (gpt-oss).
Layout = Literal["half", "interleaved", "interleaved_first", "half_once"]
LAYOUTS: tuple[Layout, ...] = ("half", "interleaved", "interleaved_first", "half_once")


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, layout: Layout = "half") -> tuple[Tensor, Tensor]:
    """Queries and keys turned to their positions.

    Args:
        q: Queries [B, heads, T, head_dim], any strides.
        k: Keys [B, kv_heads, T, head_dim], any strides.
        cos: Cosines as transformers gives them for the layout, [B or 1, T, R], or R/2 for "half_once"; features after
            the first R pass through.
        sin: Sines, alike.
        layout: Which features are a pair, and where its angle is.

    Returns:
        The same shapes and dtypes. Results and gradients lie in memory as [B, T, heads, head_dim], so that
        `transpose(1, 2).flatten(2)` costs nothing.
    """
    return _Rope.apply(q, k, cos, sin, layout)  # pyright: ignore[reportReturnType]


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: Layout = "half",
    inverse: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`rope` of one tensor [B, heads, T, head_dim] without autograd, for functions that do their own.

    Args:
        x: What is turned.
        cos: As in `rope`.
        sin: As in `rope`.
        layout: As in `rope`.
        inverse: Turn back, which is also the gradient.
        out: Where to write, with any strides; may be x itself, but not overlap it otherwise. None is new memory, laid
            out as in `rope`.
    """
    if out is None:
        batch, heads, tokens, head_dim = x.shape
        out = torch.empty(batch, tokens, heads, head_dim, dtype=x.dtype, device=x.device).transpose(1, 2)
    width = cos.shape[-1]
    if layout == "half_once":
        width = min(2 * width, x.shape[-1])
        cos, sin = cos[..., : width // 2], sin[..., : width // 2]
    if out is not x and width < x.shape[-1]:
        out[..., width:].copy_(x[..., width:])
    if use_triton(x):
        from nbtune.kernels.triton import rope as twin

        twin.rotate(x, cos, sin, width // 2, layout=layout, inverse=inverse, out=out)
        return out
    x_turned = x[..., :width]
    out_turned = x_turned if out is x else out[..., :width]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if layout == "half_once":
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    if layout in ("half", "half_once"):
        _turn_halves(x_turned, cos, sin, inverse, out_turned)
    else:
        angles = slice(0, None, 2) if layout == "interleaved" else slice(width // 2)
        _turn_interleaved(x_turned, cos[..., angles], sin[..., angles], inverse, out_turned)
    return out


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, out: Tensor) -> None:
    half = x.shape[-1] // 2
    if cos.dtype is not x.dtype:  # OLMo's angles in fp32 for activations in bf16: rounded once, at the end
        wide = torch.empty_like(x, dtype=cos.dtype)
        _turn_halves(x.to(cos.dtype), cos, sin, inverse, wide)
        out.copy_(wide)
        return
    first, second = x[..., :half], x[..., half:]
    sin_first, sin_second = sin[..., :half], sin[..., half:]
    sign = -1.0
    if inverse:
        sin_first, sin_second, sign = sin_second, sin_first, 1.0
    if out is x:  # in place, both halves are still needed after the first is written
        first, second = first.clone(), second.clone()
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(second, sin_first, value=sign)
    out[..., half:].addcmul_(first, sin_second, value=-sign)


def _turn_interleaved(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, out: Tensor) -> None:
    """One complex product: the pairs lie in memory as complex numbers do."""
    precision = compute_dtype(x.dtype)
    angle = torch.complex(cos.to(precision), (-sin if inverse else sin).to(precision))
    pairs = torch.view_as_complex(x.to(precision).unflatten(-1, (-1, 2)))
    out.copy_(torch.view_as_real(pairs * angle).flatten(-2))


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, layout):  # noqa: ANN001, ANN205
        ctx.save_for_backward(cos, sin)
        ctx.layout = layout
        return rotate(q, cos, sin, layout=layout), rotate(k, cos, sin, layout=layout)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):  # noqa: ANN001, ANN002, ANN205 # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        back = (
            rotate(grad, cos, sin, layout=ctx.layout, inverse=True) if needed else None
            for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)
        )
        return (*back, None, None, None)
