"""Checkpoints: everything that a resume needs, in safetensors and JSON.

checkpoints/step-00000020/
weights.safetensors     the trained parameters, by name, as they are in memory, and what a method follows (AdaLoRA)
optimizer.safetensors   AdamW's averages and step counts, by parameter name
state.json              the step; with the spec's seed it fixes the learning rate, the data position and the
random numbers, which are all functions of (seed, step)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from nbtune._files import atomic_folder
from nbtune.errors import RunError

FORMAT = 1


def save(folder: Path, step: int, parameters: Mapping[str, Tensor], optimizer: Optimizer, keep: int) -> Path:
    """Write the checkpoint of `step` (optimiser steps done) under `folder` and drop all but the newest `keep`.

    Writing the step that is already there is a no-op: a checkpoint is a function of the step.
    """
    path = folder / f"step-{step:08d}"
    if not path.exists():
        with atomic_folder(path) as temporary:
            weights = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
            save_file(weights, temporary / "weights.safetensors")
            save_file(_optimizer_tensors(parameters, optimizer), temporary / "optimizer.safetensors")
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
        parameter.copy_(weights[name])

    tensors = load_file(path / "optimizer.safetensors")
    states = {}
    for index, name in enumerate(_optimizer_names(parameters, optimizer)):
        prefix = f"{name}:"
        states[index] = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {i: state for i, state in states.items() if state}, "param_groups": groups})
    return step


def _optimizer_tensors(parameters: Mapping[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    names = _optimizer_names(parameters, optimizer)
    return {
        f"{names[index]}:{key}": value.detach().cpu().contiguous()
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def _optimizer_names(parameters: Mapping[str, Tensor], optimizer: Optimizer) -> list[str]:
    """The parameters' names in the order in which `optimizer` numbers them."""
    name_of = {parameter: name for name, parameter in parameters.items()}
    return [name_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]
