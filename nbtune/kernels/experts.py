"""The experts of a mixture with low-rank updates: a token meets the weights and the factors of its own experts only.

y = W_e x + s B_e A_e x        for a token x that is routed to expert e
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nbtune.kernels.low_rank import LowRank

Factors = Mapping[str, LowRank]  # by the name of a parameter, A [E, r, in] and B [E, out, r]


def _ends(expert: Tensor, experts: int) -> Tensor:
    """For the experts [S] of some rows, ascending: the row after each expert's last, [E]."""
    return torch.searchsorted(expert, torch.arange(experts, device=expert.device), right=True).int()


def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The rows x [S, in], in the order of their experts, times their expert's part of weight [E, in, out]: [S, out]."""
    # torch's kernel takes no fp64 and wants all rows to be multiples of 16 bytes.
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    modern = x.is_cpu or (x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0))
    if aligned and modern and x.dtype is not torch.float64:
        return F.grouped_mm(x, weight, offs=ends)
    parts = zip(x.split(ends.diff(prepend=ends.new_zeros(1)).tolist()), weight.unbind(), strict=True)
    return torch.cat([rows @ matrix for rows, matrix in parts if len(rows)] or [x @ weight[0]])


def experts_forward(base: Any, updates: Sequence[Factors], which: Tensor | None, x: Tensor, *routing: Tensor) -> Tensor:
    """The output [T, hidden] of a module of experts for x [T, hidden], with the sum of the updates.

    The module is one that transformers marks with `use_experts_implementation`, or Llama 4's. `routing` is top_k_index
    [T, k], the experts of each token, and top_k_weights [T, k]. Without it (Llama 4) x is weighted already, and holds
    the tokens once for each expert. With `which` [T] token t gets `updates[which[t]]` only, or none where that is -1.
    """
    experts = len(base.down_proj)
    if routing:
        top_k_index, top_k_weights = routing
    else:
        top_k_index = torch.arange(experts, device=x.device).repeat_interleave(len(x) // experts)[:, None]
        top_k_weights = x.new_ones(top_k_index.shape)
        # The layer took x for the tokens of one row after the other; they are that only within one expert.
        which = None if which is None else which[::experts].repeat(experts)
    expert, order = top_k_index.flatten().sort(stable=True)  # [T*k]: pairs of a token and an expert, by expert
    token = order // top_k_index.shape[1]
    ends = _ends(expert, experts)
    parts: list[tuple[Factors, Any, Tensor]] = [(factors, None, ends) for factors in updates]
    if which is not None:
        rows_of = [(which[token] == number).nonzero().squeeze(1) for number in range(len(updates))]
        parts = [(updates[number], rows, _ends(expert[rows], experts)) for number, rows in enumerate(rows_of)]

    def project(name: str, x: Tensor) -> Tensor:
        weight = base._parameters[name]
        x = x.to(weight.dtype)
        y = _product(x, weight if not routing or base.is_transposed else weight.mT, ends)
        if routing and base.has_bias:
            y += base._parameters[f"{name}_bias"][expert]
        for factors, rows, own_ends in (part for part in parts if name in part[0]):
            A, B, scaling = factors[name]
            A, B = A.to(x.dtype), B.to(x.dtype)
            # PEFT, and so the file, takes Llama 4's weights [E, in, out] for [E, out, in].
            first, second = (A.mT, B.mT) if routing else (B, A)  # [E, in, r], [E, r, out]
            hidden = _product(x if rows is None else x[rows], first, own_ends) * scaling
            change = _product(hidden, second, own_ends)
            y = y.add_(change) if rows is None else y.index_add_(0, rows, change)
        return y

    y = project("gate_up_proj" if not routing or base.has_gate else "up_proj", x[token])
    if routing:
        y = base._apply_gate(y) if base.has_gate else base.act_fn(y)
    else:
        y = base.act_fn(y.chunk(2, dim=-1)[0]) * y.chunk(2, dim=-1)[1]
    y = project("down_proj", y)
    if routing and base.has_post_expert_norm:
        y = base.post_expert_norm(y)
    y = y * top_k_weights.flatten()[order, None]
    # Put back in order and summed, since index_add adds in any order on a GPU.
    return y[order.argsort()].unflatten(0, top_k_index.shape).sum(1).to(x.dtype)
