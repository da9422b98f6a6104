"""Linear layers with low-rank updates as one autograd function: y_j = W_j x + b_j + sum_k s B A d(x), d a dropout.

What PEFT's two products and an addition cost in memory traffic is not there: each update is accumulated in the base
layer's output, and in the gradient of x, by the matrix product itself (`addmm_`). Layers that share their input (query,
key and value; gate and up) share the products with their A, and sum their gradients of it in one buffer.

An update may be of a stretch of the rows only, so that the tokens of several adapters go through a base
layer together.

Saved for the backward pass are x and the small A x; the base weights are only referred to, and made again where
they are quantised. The idea of one function for base and update is Unsloth's (github.com/unslothai/unsloth).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nbtune.kernels.casts import cast


class Update(NamedTuple):
    """The low-rank update scaling * B A of one layer."""

    A: Tensor  # [r, in]
    B: Tensor  # [out, r]
    scaling: float
    dropout: float = 0.0  # of its input
    trained_in: torch.dtype | None = None  # where A and B are casts of what is trained
    stretch: tuple[int, int] | None = None  # the rows [start, end) that it is for; None: all
    generator: torch.Generator | None = None  # of the dropout's seeds; None: torch's own

    def of(self, rows: Tensor) -> Tensor:
        """The update's stretch of rows [T, ...], a view."""
        return rows if self.stretch is None else rows[self.stretch[0] : self.stretch[1]]

    def in_precision(self, dtype: torch.dtype) -> Update:
        return self._replace(A=cast(self.A, dtype), B=cast(self.B, dtype), trained_in=self.A.dtype)


class LoraLinear(NamedTuple):
    """A linear layer with any number of updates, as tensors."""

    weight: Callable[
        [torch.dtype], Tensor
    ]  # gives [out, in] in a precision: the base weight, or what it dequantises to
    bias: Tensor | None  # [out]
    updates: tuple[Update, ...]
    trained: Tensor | None = None  # the base weight itself, where it is trained

    @property
    def tensors(self) -> list[Tensor | None]:
        """What may be trained, in the order in which `tensor_gradients` gives gradients."""
        return [self.trained, self.bias, *(factor for update in self.updates for factor in (update.A, update.B))]

    def in_precision(self, dtype: torch.dtype) -> LoraLinear:
        """The same with the updates cast, for `products` and the gradients."""
        return self._replace(updates=tuple(update.in_precision(dtype) for update in self.updates))


def lora_linears(x: Tensor, layers: Sequence[LoraLinear]) -> tuple[Tensor, ...]:
    """The outputs [..., out_j] of layers that share the input x [..., in], in the precision of x."""
    layers = tuple(layers)
    tensors = [tensor for layer in layers for tensor in layer.tensors]
    return _LoraLinears.apply(x, layers, *tensors)  # pyright: ignore[reportReturnType]


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layers, *tensors):  # noqa: ANN001, ANN002, ANN205, ARG004 - they are in layers, too
        flat = x.reshape(-1, x.shape[-1])  # [T, in]
        layers = [layer.in_precision(x.dtype) for layer in layers]
        outputs, hidden, seeds = products(flat, layers)
        ctx.layers, ctx.seeds, ctx.shape = layers, seeds, x.shape
        ctx.save_for_backward(flat, *hidden)
        ctx.set_materialize_grads(False)
        return tuple(y.view(*x.shape[:-1], -1) for y in outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):  # noqa: ANN001, ANN002, ANN205 # pyright: ignore[reportIncompatibleMethodOverride]
        flat, *hidden = ctx.saved_tensors
        grads = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        dx, inner = input_gradient(ctx.layers, ctx.seeds, grads, ctx.needs_input_grad[0])
        of_tensors = tensor_gradients(flat, ctx.layers, hidden, ctx.seeds, grads, inner, ctx.needs_input_grad[2:])
        return None if dx is None else dx.view(ctx.shape), None, *of_tensors


def products(x: Tensor, layers: Sequence[LoraLinear]) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """For x [T, in] the outputs [T, out_j]; and, for the backward pass, A d(x) [T, r] and the seeds of d by update."""
    outputs = [F.linear(x, layer.weight(x.dtype), _cast(layer.bias, x.dtype)) for layer in layers]
    owners = [(y, update) for y, layer in zip(outputs, layers, strict=True) for update in layer.updates]
    updates = [update for _, update in owners]
    seeds = [_new_seed(update) if update.dropout else 0 for update in updates]
    hidden: list[Tensor] = [x] * len(updates)
    for numbers in _by_stretch(updates):
        some = [updates[number] for number in numbers]
        rows = some[0].of(x)
        if any(seeds[number] for number in numbers):
            found = [_dropped(rows, u.dropout, seeds[n]) @ u.A.t() for n, u in zip(numbers, some, strict=True)]
        else:
            found = (rows @ _rows(some).t()).split([len(update.A) for update in some], dim=1)
        for number, z in zip(numbers, found, strict=True):
            hidden[number] = z
    for (y, update), z in zip(owners, hidden, strict=True):
        update.of(y).addmm_(z, update.B.t(), alpha=update.scaling)
    return outputs, hidden, seeds


def input_gradient(
    layers: Sequence[LoraLinear], seeds: Sequence[int], grads: Sequence[Tensor | None], needs_x: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradient of x [T, in] for those [T, out_j] of `products`, None if it is not needed; and s dy B by update."""
    dx: Tensor | None = None
    inner: list[Tensor | None] = []
    for layer, dy in zip(layers, grads, strict=True):
        if dy is None:
            inner += [None] * len(layer.updates)
            continue
        inner += [(update.of(dy) @ update.B).mul_(update.scaling) for update in layer.updates]  # [T, r]
        if needs_x:
            weight = layer.weight(dy.dtype)
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
            del weight  # one dequantised weight at a time
    if dx is None:
        return None, inner
    updates = [update for layer in layers for update in layer.updates]
    for numbers in _by_stretch(updates):
        through = [(updates[n], dz, seeds[n]) for n in numbers if (dz := inner[n]) is not None]
        rows = updates[numbers[0]].of(dx)
        if any(seeds[number] for number in numbers):
            for update, dz, seed in through:
                rows.add_(_dropped(dz @ update.A, update.dropout, seed))
        elif through:
            rows.addmm_(_columns([dz for _, dz, _ in through]), _rows([update for update, _, _ in through]))
    return dx, inner


def tensor_gradients(
    x: Tensor,
    layers: Sequence[LoraLinear],
    hidden: Sequence[Tensor],
    seeds: Sequence[int],
    grads: Sequence[Tensor | None],
    inner: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of the layers' `tensors`, given x [T, in], what `products` and `input_gradient` gave, and needs."""
    dA = _gradients_of_A(x, [update for layer in layers for update in layer.updates], seeds, inner)
    by_update, wanted = iter(zip(hidden, dA, strict=True)), iter(needs)
    found: list[Tensor | None] = []
    for layer, dy in zip(layers, grads, strict=True):
        needs_weight, needs_bias = next(wanted), next(wanted)
        found.append(dy.t() @ x if needs_weight and dy is not None else None)
        found.append(dy.sum(0) if needs_bias and dy is not None else None)
        for update in layer.updates:
            (z, of_A), (needs_A, needs_B) = next(by_update), (next(wanted), next(wanted))
            found.append(of_A.to(update.trained_in, copy=True) if needs_A and of_A is not None else None)
            # [r, out] first: a product with a long side of r columns is slow on a CPU.
            of_B = (z.t() @ update.of(dy)).t().contiguous() if needs_B and dy is not None else None
            found.append(None if of_B is None else of_B.to(update.trained_in).mul_(update.scaling))
    return found


def _gradients_of_A(
    x: Tensor, updates: Sequence[Update], seeds: Sequence[int], inner: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """[r, in] by update."""
    found: list[Tensor | None] = [None] * len(updates)
    for numbers in _by_stretch(updates):
        known = [(number, dz) for number in numbers if (dz := inner[number]) is not None]
        rows = updates[numbers[0]].of(x)
        if any(seeds[number] for number in numbers):
            for number, dz in known:
                found[number] = dz.t() @ _dropped(rows, updates[number].dropout, seeds[number])
        elif known:
            parts = (_columns([dz for _, dz in known]).t() @ rows).split([dz.shape[1] for _, dz in known])
            for (number, _), part in zip(known, parts, strict=True):
                found[number] = part
    return found


def _by_stretch(updates: Sequence[Update]) -> list[list[int]]:
    """The numbers of the updates of each stretch, which share products; each is with those of the same rows."""
    stretches: dict[tuple[int, int] | None, list[int]] = {}
    for number, update in enumerate(updates):
        stretches.setdefault(update.stretch, []).append(number)
    return list(stretches.values())


def _columns(matrices: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(matrices), dim=1) if len(matrices) > 1 else matrices[0]


def _rows(updates: Sequence[Update]) -> Tensor:
    """All A as one, [sum of r, in]."""
    return torch.cat([update.A for update in updates]) if len(updates) > 1 else updates[0].A


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _new_seed(update: Update) -> int:
    """From the update's generator, or torch's on the CPU; a run seeds it for every step."""
    return int(torch.randint(1, 2**62, (), generator=update.generator))


def _dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """X with a share p of its entries zero and the rest scaled up; the same entries for the same seed."""
    if not p:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    kept = torch.empty_like(x).bernoulli_(1 - p, generator=generator)
    return kept.mul_(x).div_(1 - p)
