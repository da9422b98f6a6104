"""The Triton twin of `kernels/gated.py`: each element is read once, computed in fp32, and written once."""

# Triton types a kernel's parameters as if a launch took constexprs and no options.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nbtune.kernels.triton import launches

TILE = 1024  # columns of a row for one program


def forward(g: Tensor, u: Tensor, activation: str, out: Tensor) -> None:
    """Write act(g) u into `out`; all [..., F] and viewable as rows. `out` may be g or u."""
    rows = [x.view(-1, x.shape[-1]) for x in (g, u, out)]
    count, width = rows[0].shape
    if launches(g):
        _forward[(count, triton.cdiv(width, TILE))](
            *rows, width, *(x.stride(0) for x in rows), *(x.stride(1) for x in rows), ACTIVATION=activation, TILE=TILE
        )


def backward_(dh: Tensor, g: Tensor, u: Tensor, activation: str) -> None:
    """As `gated.gated_backward_`."""
    rows = [x.view(-1, x.shape[-1]) for x in (dh, g, u)]
    count, width = rows[0].shape
    if launches(g):
        _backward[(count, triton.cdiv(width, TILE))](
            *rows, width, *(x.stride(0) for x in rows), *(x.stride(1) for x in rows), ACTIVATION=activation, TILE=TILE
        )


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """act(x) and its slope, in fp32."""
    if ACTIVATION == "relu":
        active = tl.maximum(x, 0.0)
        slope = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        share = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        active = x * share
        slope = share + x * density
    else:  # x sigmoid(k(x))
        if ACTIVATION == "gelu_pytorch_tanh":
            argument = 1.5957691216057308 * x * (1 + 0.044715 * x * x)
            inner_slope = 1.5957691216057308 * (1 + 3 * 0.044715 * x * x)
        elif ACTIVATION == "quick_gelu":
            argument = 1.702 * x
            inner_slope = 1.702
        else:
            tl.static_assert(ACTIVATION == "silu")
            argument = x
            inner_slope = 1.0
        sigmoid = tl.sigmoid(argument)
        active = x * sigmoid
        slope = sigmoid + active * (1 - sigmoid) * inner_slope
    return active, slope


@triton.jit
def _forward(
    g,
    u,
    out,
    width,
    g_row,
    u_row,
    out_row,
    g_column,
    u_column,
    out_column,
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = column < width
    x = tl.load(g + row * g_row + column * g_column, mask=mask, other=0.0).to(tl.float32)
    values = tl.load(u + row * u_row + column * u_column, mask=mask, other=0.0).to(tl.float32)
    active, _ = _activate(x, ACTIVATION)
    tl.store(out + row * out_row + column * out_column, (active * values).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    dh, g, u, width, dh_row, g_row, u_row, dh_column, g_column, u_column, ACTIVATION: tl.constexpr, TILE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = column < width
    dh += row * dh_row + column * dh_column
    g += row * g_row + column * g_column
    u += row * u_row + column * u_column
    grad = tl.load(dh, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(g, mask=mask, other=0.0).to(tl.float32)
    values = tl.load(u, mask=mask, other=0.0).to(tl.float32)
    active, slope = _activate(x, ACTIVATION)
    dtype: tl.constexpr = g.dtype.element_ty
    tl.store(dh, (active * values).to(dtype), mask=mask)
    tl.store(g, (grad * values * slope).to(dtype), mask=mask)
    tl.store(u, (grad * active).to(dtype), mask=mask)
