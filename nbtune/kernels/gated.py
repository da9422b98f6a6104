"""The gated activation of an MLP, h = act(g) u, and its gradients in the buffers that are there already.

What is saved is g and u: act(g) and h are made again in the backward pass. Most activations are x sigmoid(k(x)) for
some k: silu (k = x), quick_gelu (k = 1.702 x), and gelu's tanh form, whose 0.5 (1 + tanh z) is sigmoid(2 z); on a CPU
torch's sigmoid is six times as fast as its tanh. Then, with p = sigmoid(k(g)) and s = act(g) = g p,

h = s u        dL/du = s dL/dh        dL/dg = (p + (s - s p) k'(g)) u dL/dh
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from nbtune.kernels.row_blocks import block_rows, compute_dtype

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}  # transformers' names, and what they compute

# k(x) = slope (x + cubic x^3)
_SIGMOID: Mapping[str, tuple[float, float]] = {
    "silu": (1.0, 0.0),
    "quick_gelu": (1.702, 0.0),
    "gelu_pytorch_tanh": (2 * math.sqrt(2 / math.pi), 0.044715),
}


def gated_activation(g: Tensor, u: Tensor, activation: str) -> Tensor:
    """act(g) u for the gate g and the values u, [..., F] of one dtype, saving these two only."""
    return _GatedActivation.apply(g, u, activation)  # pyright: ignore[reportReturnType]


def gated(g: Tensor, u: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """The same without autograd, in new memory or in `out`, which may be g but not u."""
    out = torch.empty_like(g, memory_format=torch.contiguous_format) if out is None else out
    for gate, values, h in _blocks(g, u, out):
        if activation == "gelu_pytorch_tanh":
            x = gate.to(compute_dtype(g.dtype))
            h.copy_(_sigmoid(x, activation, out=torch.empty_like(x)).mul_(x).mul_(values))
        else:
            h.copy_(ACTIVATIONS[activation](gate)).mul_(values)
    return out


def gated_backward_(dh: Tensor, g: Tensor, u: Tensor, activation: str) -> None:
    """Write h over dh = dL/dh, dL/dg over g and dL/du over u. All are [..., F], of one dtype and viewable as rows."""
    precision = compute_dtype(g.dtype)
    scratch = None
    for dh_block, g_block, u_block in _blocks(dh, g, u):
        if scratch is None:
            scratch = g_block.new_empty((3 if g.dtype is precision else 6, *g_block.shape), dtype=precision)
        sigmoid, active, slope, *wide = scratch[:, : len(g_block)]
        x, grad, values = (
            [copy.copy_(block) for copy, block in zip(wide, (g_block, dh_block, u_block), strict=True)]
            if wide
            else (g_block, dh_block, u_block)
        )
        if activation in _SIGMOID:
            _sigmoid(x, activation, out=sigmoid)
            torch.mul(x, sigmoid, out=active)
            torch.addcmul(active, active, sigmoid, value=-1, out=slope)
            _times_inner_slope_(slope, x, activation).add_(sigmoid).mul_(grad).mul_(values)
        else:
            active.copy_(ACTIVATIONS[activation](x))
            slope.copy_(_native_backward(grad * values, x, activation))
        h = torch.mul(active, values, out=sigmoid)
        u_block.copy_(torch.mul(active, grad, out=values))
        g_block.copy_(slope)
        dh_block.copy_(h)


def _blocks(*tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    """Views of the same rows of each, few enough to stay in cache on a CPU."""
    rows = [tensor.view(-1, tensor.shape[-1]) for tensor in tensors]
    return zip(*(part.split(block_rows(part)) for part in rows), strict=True)


def _sigmoid(x: Tensor, activation: str, out: Tensor) -> Tensor:
    """The sigmoid of k(x), into `out`."""
    slope, cubic = _SIGMOID[activation]
    if cubic:
        return torch.mul(x, x, out=out).mul_(slope * cubic).add_(slope).mul_(x).sigmoid_()
    return torch.mul(x, slope, out=out).sigmoid_() if slope != 1.0 else torch.sigmoid(x, out=out)


def _times_inner_slope_(y: Tensor, x: Tensor, activation: str) -> Tensor:
    """Multiply y with k'(x); x is overwritten."""
    slope, cubic = _SIGMOID[activation]
    if cubic:
        return y.mul_(x.mul_(x).mul_(3 * slope * cubic).add_(slope))
    return y if slope == 1.0 else y.mul_(slope)


def _native_backward(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, x)
    return torch.ops.aten.threshold_backward(grad, x, 0)


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, u, activation):  # noqa: ANN001, ANN205
        ctx.save_for_backward(g, u)
        ctx.activation = activation
        return gated(g.contiguous(), u.contiguous(), activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh):  # noqa: ANN001, ANN205 # pyright: ignore[reportIncompatibleMethodOverride]
        dh, dg, du = (x.clone(memory_format=torch.contiguous_format) for x in (dh, *ctx.saved_tensors))
        gated_backward_(dh, dg, du, ctx.activation)
        return dg, du, None
