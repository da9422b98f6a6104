"""Root-mean-square norm that saves its input and one number a row, never an fp32 copy of an activation.

y = n w        n = r x        r = 1 / sqrt(mean(x^2) + eps)        (arXiv:1910.07467)

dL/dx = r (w g - n mean(w g n))        dL/dw = sum over rows of g n        for g = dL/dy
"""

from __future__ import annotations

import torch
from torch import Tensor

from nbtune.kernels.row_blocks import block_rows, compute_dtype
from nbtune.kernels.triton import use_triton


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0, cast_first: bool = True) -> Tensor:
    """The norm of each row of x, bit for bit as transformers' classes round it.

    Args:
        x: Activations [..., D].
        weight: Scale of each feature [D], or None for none (Llama 4's and nanochat's weightless norms).
        eps: Added to the mean square.
        offset: Added to the weight; 1 for Gemma, whose weights are distances from one.
        cast_first: Llama rounds the normalised rows to x's precision and then multiplies them with the weight. False is
            Gemma's, OLMo 2's and gpt-oss's order: both in fp32, rounded once at the end.

    Returns:
        [..., D], contiguous, in x's dtype; with `cast_first` and a weight of more precision in that of the weight.
    """
    return _RMSNorm.apply(x, weight, eps, offset, cast_first)


def rms_norm_forward(
    x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, cast_first: bool = True
) -> tuple[Tensor, Tensor]:
    """The same without autograd, for functions that do their own: y [..., D], and r [rows, 1] in fp32."""
    if use_triton(x):
        from nbtune.kernels.triton import rms_norm as twin

        return twin.forward(x, weight, eps, offset, cast_first)
    rows = x.reshape(-1, x.shape[-1])
    precision = compute_dtype(x.dtype)
    scale = _scale(weight, offset, None if cast_first else precision)
    dtype = x.dtype if scale is None or not cast_first else torch.promote_types(x.dtype, scale.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    reciprocal = torch.empty(len(rows), 1, dtype=precision, device=x.device)
    size = block_rows(rows)
    blocks = zip(rows.split(size), y.view(rows.shape).split(size), reciprocal.split(size), strict=True)
    narrow = x.dtype is not precision
    squares = torch.empty_like(rows[:size], dtype=precision)
    wide = torch.empty_like(squares) if narrow else None
    for x_block, y_block, r in blocks:
        count = len(x_block)
        values = x_block if wide is None else wide[:count].copy_(x_block)
        square = torch.mul(values, values, out=squares[:count])
        torch.mean(square, -1, keepdim=True, out=r).add_(eps).rsqrt_()
        if wide is None:
            torch.mul(values, r, out=y_block)
            if scale is not None:
                y_block.mul_(scale)
        elif scale is None or not cast_first:
            values.mul_(r)
            y_block.copy_(values if scale is None else values.mul_(scale))
        elif y.dtype is x.dtype:
            y_block.copy_(values.mul_(r)).mul_(scale)
        else:
            torch.mul(values.mul_(r).to(x.dtype), scale, out=y_block)
    return y, reciprocal


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    reciprocal: Tensor,
    offset: float = 0.0,
    *,
    needs_x: bool = True,
    needs_weight: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """From dL/dy [..., D] dL/dx and dL/dweight (summed in fp32), in the dtypes of x and weight; None if not needed."""
    if use_triton(x):
        from nbtune.kernels.triton import rms_norm as twin

        return twin.backward(grad, x, weight, reciprocal, offset, needs_x=needs_x, needs_weight=needs_weight)
    width = x.shape[-1]
    rows, grad_rows = x.reshape(-1, width), grad.reshape(-1, width)
    precision = reciprocal.dtype
    scale = _scale(weight, offset, precision)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_weight = torch.zeros(width, dtype=precision, device=x.device) if needs_weight else None
    size = block_rows(rows)
    products = torch.empty_like(rows[:size], dtype=precision)
    wide_x = torch.empty_like(products) if x.dtype is not precision else None
    wide_grad = torch.empty_like(products) if wide_x is not None or grad.dtype is not precision else None
    parts = (rows, grad_rows, grad_x.view(rows.shape), reciprocal)
    for x_block, g_block, out, r in zip(*(part.split(size) for part in parts), strict=True):
        count = len(x_block)
        values = x_block if wide_x is None else wide_x[:count].copy_(x_block)
        grads = g_block if wide_grad is None else wide_grad[:count].copy_(g_block)
        product = torch.mul(grads, values, out=products[:count])
        if grad_weight is not None:
            grad_weight.addmv_(product.T, r.squeeze(1))
        if not needs_x:
            continue
        dot = product.sum(1) if scale is None else torch.mv(product, scale)
        inner = (dot[:, None] * r.pow(3)).div_(-width)
        wide = out if wide_grad is None else grads
        wide = torch.mul(grads, r, out=wide)
        if scale is not None:
            wide.mul_(scale)
        wide.addcmul_(values, inner)
        if wide is not out:
            out.copy_(wide)
    return (
        grad_x if needs_x else None,
        None if weight is None or grad_weight is None else grad_weight.to(weight.dtype),
    )


def _scale(weight: Tensor | None, offset: float, dtype: torch.dtype | None) -> Tensor | None:
    """The sum of weight and offset in `dtype`, or in the weight's own."""
    if weight is None:
        return None
    scale = weight if dtype is None else weight.to(dtype)
    return scale if offset == 0.0 else scale + offset


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset, cast_first):  # noqa: ANN001, ANN205
        y, reciprocal = rms_norm_forward(x, weight, eps, offset, cast_first)
        ctx.save_for_backward(x, weight, reciprocal)
        ctx.offset = offset
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # noqa: ANN001, ANN205 # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, reciprocal = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grads = rms_norm_backward(grad, x, weight, reciprocal, ctx.offset, needs_x=needs_x, needs_weight=needs_weight)
        return (*grads, None, None, None)
