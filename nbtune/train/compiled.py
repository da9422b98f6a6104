"""torch.compile of a model's blocks, and after how many steps it has paid.

Each block is compiled by itself, so blocks that are alike share one compilation and the state dict keeps its keys. The
sizes are symbols: packed rows differ in length. The attention over segments runs as it is, between two graphs. Compiled
blocks take the place of fused ones (`nbtune.fused`), whose autograd functions the compiler does not look into.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nbtune._transformers import AttentionInterface, PreTrainedModel
from nbtune.errors import NbtuneError
from nbtune.fused import fused
from nbtune.kernels import attention
from nbtune.modules.checkpointing import blocks_of
from nbtune.train.events import Event

UNCOMPILED = "nbtune_packed_uncompiled"  # the value of `attn_implementation`
REPEATS = 2


def compile_blocks(model: PreTrainedModel) -> None:
    """Compile the blocks of `model` for training steps; a forward pass without gradients runs as it did.

    Nothing is compiled before the first such step. Only these module objects are touched.
    """
    AttentionInterface.register(UNCOMPILED, torch.compiler.disable(attention.packed_attention))
    model.set_attn_implementation(UNCOMPILED)
    for block in blocks_of(model):
        block.compile(dynamic=True)
        block._compiled_call_impl = _in_training(block, block._compiled_call_impl)


def _in_training(block: nn.Module, compiled: Any) -> Callable[..., Any]:
    """Evaluation would be another compilation, for a few forward passes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        run = compiled if block.training and torch.is_grad_enabled() else block._call_impl
        return run(*args, **kwargs)

    return call


def compile_and_time(model: PreTrainedModel, work: Callable[[], None], work_per_step: int, steps: int) -> Event:
    """Compile the blocks of `model` by doing some `work`, and report what that took and what it brings.

    Args:
        model: The model, set to nbtune's packed attention and not fused.
        work: A forward and a backward pass that leave no trace.
        work_per_step: How many of those an optimiser step is.
        steps: How many steps there will be.

    Returns:
        The `compile` event: `compile_seconds`, the seconds of a step's work before (with fused blocks) and after,
        `break_even_steps`, None where compiled blocks are not faster, and a `message` that says so.

    Raises:
        NbtuneError: The compiler fails.
    """
    with fused(model):
        work()  # the first pass sets libraries up
        before = _least_seconds(work)
    compile_blocks(model)
    from torch._dynamo.exc import TorchDynamoException  # takes seconds to import

    began = time.perf_counter()
    try:
        work()
    except TorchDynamoException as error:
        raise NbtuneError(
            "The model's blocks cannot be compiled",
            str(error).strip().splitlines()[0],
            "Set training.torch_compile to false.",
        ) from error
    first = time.perf_counter() - began
    after = _least_seconds(work)
    compiling, before, after = max(0.0, first - after), before * work_per_step, after * work_per_step
    break_even = math.ceil(compiling / (before - after)) if after < before else None
    if break_even is None:
        verdict = "which never pays: set torch_compile to false"
    else:
        verdict = f"which pays after {break_even:,} steps" + (f"; there are {steps:,}" if break_even > steps else "")
    return {
        "type": "compile",
        "compile_seconds": compiling,
        "step_seconds_before": before,
        "step_seconds_after": after,
        "break_even_steps": break_even,
        "message": f"Compiled the blocks in {compiling:.0f} s; the passes of a step take {after:.3g} s instead of"
        f" {before:.3g} s, {verdict}",
    }


def _least_seconds(work: Callable[[], None]) -> float:
    """Of `REPEATS` times; `work` waits for the device."""
    least = math.inf
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - began)
    return least
