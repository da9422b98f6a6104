"""Sharded weights (FSDP2): each process keeps its share of every weight, and has a block whole while it computes it.

What every weight's training needs (gradients, averages) is sharded too. An adapter's weights stay whole in every
process: they are small, and their gradients are added up as they are without sharding.

Sharded weights are DTensors; in files they are whole, so that any number of processes can go on from them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from nbtune.modules.checkpointing import blocks_of
from nbtune.train.loss import CausalLMLoss


def shard(loss_model: CausalLMLoss, device: torch.device, compute_dtype: torch.dtype, *, every_weight: bool) -> None:
    """Shard the model's weights over all processes, and bring them to `device`.

    Args:
        loss_model: The model, with its adapter if it has one; whole, and the same in every process.
        device: Where this process computes.
        compute_dtype: fp32 weights that are trained are gathered in this precision.
        every_weight: Whether every weight is trained; else the trained ones are an adapter's, and stay whole.
    """
    from torch.distributed import get_world_size, init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    trained = {p for p in loss_model.parameters() if p.requires_grad}
    kept = set() if every_weight else trained
    for parameter in kept:
        parameter.data = parameter.data.to(device)
    policy = MixedPrecisionPolicy()
    if every_weight and compute_dtype != torch.float32 and {p.dtype for p in trained} == {torch.float32}:
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (get_world_size(),)),
        "mp_policy": policy,
        "ignored_params": kept,
    }
    for module in (*blocks_of(loss_model.model), loss_model):
        before = [p for p in module.parameters() if p not in kept and not _is_sharded(p)]
        sharded: Any = fully_shard(module, **options)
        for parameter in before:  # an adapter remembers which parameters it froze: they must not keep the whole weights
            parameter.data = parameter.data.new_empty(0)
        # The losses are divided by the tokens of all processes: gradients are added up, not averaged.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    for method in ("verify", "within"):
        register_fsdp_forward_method(loss_model, method)


def whole(tensor: Any, *, keep: bool = True) -> Any:
    """A sharded tensor put together, which all processes must do at once; any other as it is.

    Without `keep` this process only helps the others, and gets nothing of it.
    """
    if not _is_sharded(tensor):
        return tensor
    full = tensor.full_tensor()
    return full if keep else full.new_empty(0)


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy whole `values` into a tensor: into this process's share of a sharded one."""
    tensor.copy_(like(values, tensor))


def like(values: Tensor, tensor: Any) -> Tensor:
    """Whole `values` sharded as `tensor` is; as they are where it is not."""
    if not _is_sharded(tensor):
        return values
    from torch.distributed.tensor import distribute_tensor

    here = values.to(tensor.device)
    return distribute_tensor(here, tensor.device_mesh, tensor.placements, src_data_rank=None)


def whole_state(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The state dict of a sharded model, on the host; what is tied stays one tensor. Empty without `keep`."""
    made: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in made:
            made[id(tensor)] = whole(tensor.detach(), keep=keep).cpu()
        state[name] = made[id(tensor)]
    return state if keep else {}


def _is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor. Their module takes seconds to import, and without it there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
