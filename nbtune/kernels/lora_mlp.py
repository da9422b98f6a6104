"""A gated MLP with low-rank updates as one autograd function: y = down(act(gate(x)) * up(x)).

Saved for the backward pass are x and what gate and up give; the activation and its product, which autograd would save
too, are made again. SwiGLU and GEGLU are Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nbtune.kernels.gated import gated, gated_backward_
from nbtune.kernels.lora_linear import LoraLinear, input_gradient, products, tensor_gradients


def lora_mlp(x: Tensor, first: Sequence[LoraLinear], down: LoraLinear, activation: str) -> Tensor:
    """The output [..., D] for x [..., D].

    `first` are gate and up, or one layer that gives both, the gate's features first (Phi 3); `activation` is one of
    `gated.ACTIVATIONS`. The backward pass writes over what was saved: a second one through the same graph raises
    RuntimeError.
    """
    tensors = [tensor for layer in (*first, down) for tensor in layer.tensors]
    return _LoraMlp.apply(x, first, down, activation, *tensors)  # pyright: ignore[reportReturnType]


class _LoraMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, first, down, activation, *tensors):  # noqa: ANN001, ANN002, ANN205, ARG004 - they are in the layers, too
        flat = x.reshape(-1, x.shape[-1])  # [T, D]
        first, down = [layer.in_precision(x.dtype) for layer in first], down.in_precision(x.dtype)
        inner, hidden, seeds = products(flat, first)  # [T, I] twice, or [T, 2 I]
        h = gated(*_gate_and_up(inner), activation)
        (y,), of_down, down_seeds = products(h, (down,))
        ctx.first, ctx.down, ctx.activation, ctx.shape = first, down, activation, x.shape
        ctx.seeds, ctx.down_seeds = seeds, down_seeds
        ctx.save_for_backward(flat, *inner, *hidden, *of_down)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # noqa: ANN001, ANN205 # pyright: ignore[reportIncompatibleMethodOverride]
        flat, *saved = ctx.saved_tensors
        inner, hidden = saved[: len(ctx.first)], saved[len(ctx.first) :]
        hidden, of_down = hidden[: len(ctx.seeds)], hidden[len(ctx.seeds) :]
        needs, count = ctx.needs_input_grad[4:], sum(len(layer.tensors) for layer in ctx.first)
        dy = dy.reshape(-1, dy.shape[-1])
        h, dz = input_gradient((ctx.down,), ctx.down_seeds, [dy], needs_x=True)
        assert h is not None
        gated_backward_(h, *_gate_and_up(inner), ctx.activation)  # from h's gradient to h, from g and u to theirs
        down_gradients = tensor_gradients(h, (ctx.down,), of_down, ctx.down_seeds, [dy], dz, needs[count:])
        del h
        dx, dz = input_gradient(ctx.first, ctx.seeds, inner, ctx.needs_input_grad[0])
        first_gradients = tensor_gradients(flat, ctx.first, hidden, ctx.seeds, inner, dz, needs[:count])
        return None if dx is None else dx.view(ctx.shape), None, None, None, *first_gradients, *down_gradients


def _gate_and_up(inner: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    g, u = inner if len(inner) == 2 else inner[0].chunk(2, dim=-1)
    return g, u
