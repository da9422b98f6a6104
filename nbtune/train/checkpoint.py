"""Checkpoints: everything that a resume needs, in safetensors and JSON.

checkpoints/step-00000020/
weights.safetensors     the trained parameters, by name, as they are in memory, and what a method follows (AdaLoRA)
optimizer.safetensors   AdamW's averages, their scales where they have 8 bits, and step counts, by parameter name
state.json              the step; with the spec's seed it fixes the learning rate, the data position and the
random numbers, which are all functions of (seed, step)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from nbtune._files import atomic_folder
from nbtune.errors import RunError
from nbtune.train.sharding import fill, like, whole

FORMAT = 1


def save(
    folder: Path,
    step: int,
    parameters: Mapping[str, Tensor],
    optimizer: Optimizer,
    keep: int,
    *,
    writes: bool = True,
) -> Path:
    """Write the checkpoint of `step` (optimiser steps done) under `folder` and drop all but the newest `keep`.

    Writing the step that is already there is a no-op: a checkpoint is a function of the step. Sharded tensors are put
    together by all processes, one of which `writes`.
    """
    path = folder / f"step-{step:08d}"
    weights = {name: whole(tensor.detach(), keep=writes).cpu().contiguous() for name, tensor in parameters.items()}
    averages = _optimizer_tensors(parameters, optimizer, keep=writes)
    if not writes:
        return path
    if not path.exists():
        with atomic_folder(path) as temporary:
            save_file(weights, temporary / "weights.safetensors")
            save_file(averages, temporary / "optimizer.safetensors")
            state = {"format": FORMAT, "step": step, "torch": torch.__version__}
            (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under `folder`, oldest first. One that a kill left half written has another name."""
    return sorted(folder.glob("step-*"))


def step_of(path: Path) -> int:
    """How many optimiser steps were done when the checkpoint at `path` was written."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state["format"] != FORMAT:
        raise RunError(
            "This checkpoint is of another version of nbtune",
            f"{path} has format {state['format']}, this version reads {FORMAT}.",
            "Resume with the version that wrote it.",
        )
    return state["step"]


@torch.no_grad()
def load(path: Path, parameters: Mapping[str, Tensor], optimizer: Optimizer) -> int:
    """Put the checkpoint at `path` into `parameters` and `optimizer`, bit for bit; returns the steps done."""
    step = step_of(path)
    weights = load_file(path / "weights.safetensors")
    if weights.keys() != parameters.keys():
        differing = sorted(weights.keys() ^ parameters.keys())
        raise RunError(
            "The checkpoint does not fit the model",
            f"{path} and the model differ in {len(differing)} parameters, the first of them {differing[0]}.",
            "Resume with the spec, the model and the version of nbtune that the run was started with.",
        )
    for name, parameter in parameters.items():
        fill(parameter, weights[name])

    _load_optimizer(load_file(path / "optimizer.safetensors"), parameters, optimizer)
    return step


def _optimizer_tensors(parameters: Mapping[str, Tensor], optimizer: Optimizer, *, keep: bool) -> dict[str, Tensor]:
    """What `optimizer` keeps of each parameter. A Python count (bitsandbytes' step) is stored as an int64 scalar."""
    tensors = {}
    for parameter, name in _optimizer_names(parameters, optimizer).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
            # A copy: the maps of 8-bit values are one tensor that all parameters share.
            tensors[f"{name}:{key}"] = whole(tensor.detach(), keep=keep).to("cpu", copy=True).contiguous()
    return tensors


def _load_optimizer(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, key = key.rpartition(":")
        states.setdefault(name, {})[key] = tensor
    names = _optimizer_names(parameters, optimizer)
    if any("state1" in state for state in states.values()):
        _load_bitsandbytes({parameter: states[name] for parameter, name in names.items() if name in states}, optimizer)
        return
    numbered = {
        index: {key: like(value, parameter) if value.ndim else value for key, value in states[name].items()}
        for index, (parameter, name) in enumerate(names.items())
        if name in states
    }
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})


def _load_bitsandbytes(states: Mapping[Tensor, Mapping[str, Tensor]], optimizer: Any) -> None:
    """Fill the memory that the optimiser itself makes: its own loading would put paged averages on the GPU for good."""
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if parameter in states:
                optimizer.init_state(group, parameter, group_index, index)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # paged memory is being set to zero
    for parameter, saved in states.items():
        state = optimizer.state[parameter]
        if state.keys() != saved.keys():
            raise RunError(
                "The checkpoint is of another optimiser",
                f"It keeps {', '.join(sorted(saved))} of a parameter, this one {', '.join(sorted(state))}.",
                "Resume with the spec and the version of bitsandbytes that the run was started with.",
            )
        for key, tensor in saved.items():
            if isinstance(state[key], Tensor):
                state[key].copy_(tensor)
            else:
                state[key] = int(tensor)


def _optimizer_names(parameters: Mapping[str, Tensor], optimizer: Optimizer) -> dict[Tensor, str]:
    """The name of each parameter, in the order in which `optimizer` numbers them."""
    name_of = {parameter: name for name, parameter in parameters.items()}
    return {p: name_of[p] for group in optimizer.param_groups for p in group["params"]}
