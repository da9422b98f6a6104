"""What the engine asks of a base layer, whatever its kind: its sizes, its weight, a layer with another weight.

A weight is a matrix [out, in] for a linear layer, also where the layer stores it transposed (transformers' Conv1D) or
quantised; [vocabulary, dim] for an embedding; [out, in / groups, *kernel] for a convolution.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nbtune._transformers import Conv1D
from nbtune.errors import AdapterError
from nbtune.modules import quantised

LINEARS = (nn.Linear, Conv1D)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, all modules are in eval mode; afterwards each is in its own again."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def features(base: Any) -> tuple[int, int]:
    """(out, in): the sizes of the layer's output and input; of an embedding (dim, vocabulary)."""
    if isinstance(base, nn.Embedding):
        return base.embedding_dim, base.num_embeddings
    if isinstance(base, CONVOLUTIONS):
        return base.out_channels, base.in_channels
    if isinstance(base, Conv1D):
        return base.weight.shape[1], base.weight.shape[0]
    return base.out_features, base.in_features


def refuse_groups(base: Any, path: str) -> None:
    """Raise AdapterError for a convolution in groups, whose weight is not one matrix of all inputs."""
    if isinstance(base, CONVOLUTIONS) and base.groups > 1:
        message = f"{path} is a convolution in {base.groups} groups; this method adapts only those with one."
        raise AdapterError("A convolution in groups", message, "Name it in exclude_modules.")


def require_divisor(base: Any, path: str, setting: str, size: int) -> None:
    """Raise AdapterError for blocks of a size, or in a number, that does not divide the layer's inputs and outputs."""
    out_features, in_features = features(base)
    if out_features % size or in_features % size:
        message = f"{path} is {out_features} x {in_features}; {setting} {size} does not divide both."
        divisor = f"a divisor of {math.gcd(out_features, in_features)}"
        raise AdapterError("Blocks do not fit", message, f"Set {setting} to {divisor}, or leave the layer out.")


def weight_of(base: Any) -> Tensor:
    """The layer's weight, in its own precision; of a quantised layer in that of its computations."""
    if isinstance(base, Conv1D):
        return base.weight.t()
    return quantised.dequantised(base) if quantised.is_quantised(base) else base.weight


def apply_weight(base: Any, x: Tensor, weight: Tensor) -> Tensor:
    """What the layer would give for x with this weight and no bias."""
    if isinstance(base, LINEARS):
        return F.linear(x, weight.to(x.dtype))
    tensors = {"weight": weight.to(x.dtype) if x.is_floating_point() else weight}
    if not isinstance(base, nn.Embedding) and base.bias is not None:
        tensors["bias"] = torch.zeros(len(weight), dtype=x.dtype, device=x.device)
    return torch.func.functional_call(base, tensors, (x,))


def compute_dtype(base: Any) -> torch.dtype:
    """The precision of adapter weights: fp32, or fp64 on an fp64 layer."""
    return torch.float64 if base.weight.dtype is torch.float64 else torch.float32


def empty(base: Any, *shape: int) -> Tensor:
    """A new tensor in the precision of adapter weights, on the layer's device; not filled."""
    return torch.empty(shape, dtype=compute_dtype(base), device=base.weight.device)


def zeros(base: Any, *shape: int) -> Tensor:
    return empty(base, *shape).zero_()


def ones(base: Any, *shape: int) -> Tensor:
    return empty(base, *shape).fill_(1)


def linear_init(base: Any, *shape: int) -> Tensor:
    """The same with first weights as nn.Linear's."""
    return nn.init.kaiming_uniform_(empty(base, *shape), a=math.sqrt(5))


def with_weight(base: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A copy of the layer that holds this weight and bias, in the layer's precision; nothing else is copied.

    The layer itself keeps its weight, so that it can come back bit for bit, and so that a weight tied to it (an
    embedding) stays what it was.
    """
    clone = copy.copy(base)
    clone.__dict__["_parameters"] = dict(base._parameters)
    dtype, needs = base.weight.dtype, base.weight.requires_grad
    stored = weight.t().contiguous() if isinstance(base, Conv1D) else weight
    clone.weight = nn.Parameter(stored.to(dtype), requires_grad=needs)
    if bias is not None:
        clone.bias = nn.Parameter(bias.to(dtype), requires_grad=needs)
    return clone


def rows_of(base: Any, tokens: list[int], path: str, setting: str) -> Tensor:
    """A copy of the rows [tokens, dim] of an embedding or a head. Raises AdapterError naming the `setting`."""
    if not isinstance(base, nn.Embedding | nn.Linear):
        message = f"{path} is a {type(base).__name__}; only embeddings and heads have tokens."
        raise AdapterError("Wrong kind of module", message, f"Name another in {setting}.")
    weight = weight_of(base).detach()
    beyond = [token for token in tokens if token >= len(weight)]
    if beyond:
        message = f"{setting} names {beyond[0]}, and {path} has {len(weight)} tokens, counted from 0."
        raise AdapterError("No such token", message, "Resize the model's embeddings first (resize_token_embeddings).")
    return weight[torch.tensor(tokens, dtype=torch.long, device=weight.device)].to(compute_dtype(base), copy=True)
