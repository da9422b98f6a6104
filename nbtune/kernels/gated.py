"""The gated activation of an MLP, h = act(g) u, and its gradients in the buffers that are there already.

What is saved is g and u: act(g) and h are made again in the backward pass. Some activations are computed as
x sigmoid(k(x)): quick_gelu (k = 1.702 x), and gelu's tanh form, whose 0.5 (1 + tanh z) is sigmoid(2 z); on a CPU
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
from nbtune.kernels.triton import use_triton

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}  # transformers' names, and what they compute

# x sigmoid(slope (x + cubic x^3)), where torch's own form is slower or there is none
_SIGMOID: Mapping[str, tuple[float, float]] = {
    "gelu_pytorch_tanh": (2 * math.sqrt(2 / math.pi), 0.044715),
    "quick_gelu": (1.702, 0.0),
}


def gated_activation(g: Tensor, u: Tensor, activation: str) -> Tensor:
    """act(g) u for the gate g and the values u, [..., F] of one dtype, saving these two only."""
    return _GatedActivation.apply(g, u, activation)  # pyright: ignore[reportReturnType]


def gated(g: Tensor, u: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """The same without autograd, in new memory or in `out`, which may be g but not u."""
    out = torch.empty_like(g, memory_format=torch.contiguous_format) if out is None else out
    if use_triton(g):
        from nbtune.kernels.triton import gated as twin

        twin.forward(g, u, activation, out)
        return out
    for gate, values, h in _blocks(g, u, out):
        if activation in _SIGMOID:
            x = gate.to(compute_dtype(g.dtype))
            h.copy_(_sigmoid(x, activation, out=torch.empty_like(x)).mul_(x).mul_(values))
        else:
            _native(gate, activation, out=h).mul_(values)
    return out


def gated_backward_(dh: Tensor, g: Tensor, u: Tensor, activation: str) -> None:
    """Write h over dh = dL/dh, dL/dg over g and dL/du over u. All are [..., F], of one dtype and viewable as rows."""
    if use_triton(g):
        from nbtune.kernels.triton import gated as twin

        twin.backward_(dh, g, u, activation)
        return
    backward = _backward_sigmoid_ if activation in _SIGMOID else _backward_native_
    for dh_block, g_block, u_block in _blocks(dh, g, u):
        backward(dh_block, g_block, u_block, activation)


def _backward_native_(dh: Tensor, g: Tensor, u: Tensor, activation: str) -> None:
    active = _native(g, activation, out=torch.empty_like(g))
    product = dh * u
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(product, g, grad_input=g)
    elif activation == "gelu":
        torch.ops.aten.gelu_backward.grad_input(product, g, grad_input=g)
    else:
        torch.ops.aten.threshold_backward.grad_input(product, g, 0, grad_input=g)
    h = torch.mul(active, u, out=product)
    torch.mul(dh, active, out=u)
    dh.copy_(h)


def _backward_sigmoid_(dh: Tensor, g: Tensor, u: Tensor, activation: str) -> None:
    grad, x, values = (tensor.to(compute_dtype(g.dtype)) for tensor in (dh, g, u))  # fp32: the tensors themselves
    sigmoid = _sigmoid(x, activation, out=torch.empty_like(x))
    active = x * sigmoid
    slope = torch.addcmul(active, active, sigmoid, value=-1)
    slope = _times_inner_slope_(slope, x, activation).add_(sigmoid).mul_(grad).mul_(values)
    h = torch.mul(active, values, out=sigmoid)
    u.copy_(torch.mul(active, grad, out=values))
    g.copy_(slope)
    dh.copy_(h)


def _blocks(*tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    """Views of the same rows of each, few enough to stay in cache on a CPU."""
    rows = [tensor.view(-1, tensor.shape[-1]) for tensor in tensors]
    return zip(*(part.split(block_rows(part)) for part in rows), strict=True)


def _native(x: Tensor, activation: str, out: Tensor) -> Tensor:
    """The activation of x into `out`, which may be x."""
    if activation == "silu":
        return torch.ops.aten.silu.out(x, out=out)
    if activation == "gelu":
        return torch.ops.aten.gelu.out(x, out=out)
    return torch.clamp_min(x, 0, out=out)


def _sigmoid(x: Tensor, activation: str, out: Tensor) -> Tensor:
    """The sigmoid of k(x), into `out`."""
    slope, cubic = _SIGMOID[activation]
    if cubic == 0.0:
        return torch.mul(x, slope, out=out).sigmoid_()
    return torch.mul(x, x, out=out).mul_(slope * cubic).add_(slope).mul_(x).sigmoid_()


def _times_inner_slope_(y: Tensor, x: Tensor, activation: str) -> Tensor:
    """Multiply y with k'(x); x is overwritten."""
    slope, cubic = _SIGMOID[activation]
    if cubic == 0.0:
        return y.mul_(slope)
    return y.mul_(x.mul_(x).mul_(3 * slope * cubic).add_(slope))


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
