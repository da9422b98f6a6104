"""The Triton twin of `kernels/rms_norm.py`: a program takes whole rows, reads them once and writes them once."""

# Triton types a kernel's parameters as if a launch took constexprs and no options.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nbtune.kernels.triton import launches

TILE_ELEMENTS = 4096  # of one program at a time; rows that are longer are a tile of their own
PROGRAMS_PER_PROCESSOR = 4  # in the backward pass, where each sums the weight's gradient over its rows


def forward(
    x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, cast_first: bool = True
) -> tuple[Tensor, Tensor]:
    """As `rms_norm.rms_norm_forward`."""
    rows = _rows(x)
    dtype = x.dtype if weight is None or not cast_first else torch.promote_types(x.dtype, weight.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    reciprocal = torch.empty(len(rows), 1, dtype=torch.float32, device=x.device)
    tile = _tile(rows)
    if launches(rows):
        _forward[(triton.cdiv(len(rows), tile["TILE_ROWS"]),)](
            rows,
            weight,
            y,
            reciprocal,
            len(rows),
            rows.shape[1],
            rows.stride(0),
            eps,
            offset,
            CAST_FIRST=cast_first,
            **tile,
        )
    return y, reciprocal


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    reciprocal: Tensor,
    offset: float = 0.0,
    *,
    needs_x: bool = True,
    needs_weight: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """As `rms_norm.rms_norm_backward`. The weight's gradient is summed in a fixed order: the same bits each time."""
    rows, grad_rows = _rows(x), _rows(grad)
    tile = _tile(rows)
    tiles = triton.cdiv(len(rows), tile["TILE_ROWS"])
    programs = min(tiles, PROGRAMS_PER_PROCESSOR * _processors(rows))
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x else None
    needs_weight = needs_weight and weight is not None
    partial = torch.empty(programs, rows.shape[1], dtype=torch.float32, device=x.device) if needs_weight else None
    if launches(rows):
        _backward[(programs,)](
            grad_rows,
            rows,
            weight,
            reciprocal,
            grad_x,
            partial,
            len(rows),
            rows.shape[1],
            grad_rows.stride(0),
            rows.stride(0),
            offset,
            tiles,
            **tile,
        )
    return grad_x, None if weight is None or partial is None else partial.sum(0).to(weight.dtype)


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _tile(rows: Tensor) -> dict[str, int]:
    width = triton.next_power_of_2(rows.shape[1])
    return {
        "TILE_ROWS": max(1, TILE_ELEMENTS // width),
        "TILE": width,
        "num_warps": min(max(max(width, TILE_ELEMENTS) // 1024, 4), 32),
    }


def _processors(rows: Tensor) -> int:
    real = rows.is_cuda and launches(rows)
    return torch.cuda.get_device_properties(rows.device).multi_processor_count if real else 1


@triton.jit
def _forward(
    x,
    weight,
    y,
    reciprocal,
    rows,
    width,
    x_stride,
    eps,
    offset,
    CAST_FIRST: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.arange(0, TILE)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    values = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(values * values, 1) / width + eps)
    tl.store(reciprocal + row, r, mask=row < rows)
    values = values * r[:, None]
    if CAST_FIRST:
        values = values.to(x.dtype.element_ty).to(tl.float32)
    if weight is not None:
        scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + offset
        values = values * scale[None, :]
    tl.store(y + row[:, None] * width + column[None, :], values.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    grad,
    x,
    weight,
    reciprocal,
    grad_x,
    partial,
    rows,
    width,
    grad_stride,
    x_stride,
    offset,
    tiles,
    TILE_ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    column = tl.arange(0, TILE)
    scale = tl.full((TILE,), 1.0, tl.float32)
    if weight is not None:
        scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + offset
    total = tl.zeros((TILE,), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        values = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        grads = tl.load(grad + row[:, None] * grad_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        r = tl.load(reciprocal + row, mask=row < rows, other=0.0)[:, None]
        values = values * r
        if partial is not None:
            total += tl.sum(grads * values, 0)
        if grad_x is not None:
            grads = grads * scale[None, :]
            mean = tl.sum(grads * values, 1)[:, None] / width
            change = (grads - values * mean) * r
            tl.store(grad_x + row[:, None] * width + column[None, :], change.to(grad_x.dtype.element_ty), mask=mask)
    if partial is not None:
        tl.store(partial + tl.program_id(0).to(tl.int64) * width + column, total, mask=column < width)
