"""A gated MLP with low-rank updates as one autograd function: y = down(act(gate(x)) * up(x)).

Saved for the backward pass are x and what gate and up give; the activation and its product, which autograd would save
too, are made again. SwiGLU and GEGLU are Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nbtune.kernels.gated import gated, gated_backward_
from nbtune.kernels.lora_linear import LoraLinear, input_gradient, products, tensor_gradients


def lora_mlp(x: Tensor, gate: LoraLinear, up: LoraLinear, down: LoraLinear, activation: str) -> Tensor:
    """The output [..., D] for x [..., D]; `activation` is one of `gated.ACTIVATIONS`.

    The backward pass writes over what was saved: a second one through the same graph raises RuntimeError.
    """
    tensors = [tensor for layer in (gate, up, down) for tensor in layer.tensors]
    return _LoraMlp.apply(x, (gate, up), down, activation, *tensors)  # pyright: ignore[reportReturnType]


class _LoraMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, first, down, activation, *tensors):  # noqa: ANN001, ANN205
        flat = x.reshape(-1, x.shape[-1])  # [T, D]
        first, down = [layer.in_precision(x.dtype) for layer in first], down.in_precision(x.dtype)
        (g, u), hidden, seeds = products(flat, first)  # [T, I]
        h = gated(g, u, activation)
        (y,), inner, inner_seeds = products(h, (down,))
        ctx.first, ctx.down, ctx.activation, ctx.shape = first, down, activation, x.shape
        ctx.seeds, ctx.inner_seeds = seeds, inner_seeds
        ctx.save_for_backward(flat, g, u, *hidden, *inner)
        return y.view(x.shape[:-1] + (-1,))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # noqa: ANN001, ANN205 # pyright: ignore[reportIncompatibleMethodOverride]
        flat, g, u, *hidden = ctx.saved_tensors
        hidden, inner_hidden = hidden[: len(ctx.seeds)], hidden[len(ctx.seeds) :]
        needs, of_first = ctx.needs_input_grad[4:], sum(len(layer.tensors) for layer in ctx.first)
        dy = dy.reshape(-1, dy.shape[-1])
        h, dz = input_gradient((ctx.down,), ctx.inner_seeds, [dy], needs_x=True)
        assert h is not None
        gated_backward_(h, g, u, ctx.activation)  # takes h's gradient, leaves h itself and the gradients of g and u
        of_down = tensor_gradients(h, (ctx.down,), inner_hidden, ctx.inner_seeds, [dy], dz, needs[of_first:])
        del h
        dx, dz = input_gradient(ctx.first, ctx.seeds, [g, u], ctx.needs_input_grad[0])
        of_gate_up = tensor_gradients(flat, ctx.first, hidden, ctx.seeds, [g, u], dz, needs[:of_first])
        return None if dx is None else dx.view(ctx.shape), None, None, None, *of_gate_up, *of_down
