"""The training loop, top to bottom.

Everything random or scheduled is a function of (seed, step): the order of the rows, the learning rate, dropout. So a
checkpoint is the weights, the optimiser and the step, and a resumed run computes what an uninterrupted one would have.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from nbtune.data import Batch, Batches
from nbtune.errors import NbtuneError
from nbtune.spec import TrainingSpec
from nbtune.train import checkpoint
from nbtune.train.events import Event
from nbtune.train.loss import CausalLMLoss
from nbtune.train.memory import PeakMemory, used_bytes
from nbtune.train.optim import adamw, learning_rate

OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Outcome:
    """Where the loop ended: after `step` optimiser steps, and whether because it was asked to stop."""

    step: int
    stopped: bool


@dataclass(frozen=True)
class Schedule:
    """How many optimiser steps there are, and which micro-batches each consumes."""

    batches: Batches
    training: TrainingSpec

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.batches.per_epoch / self.training.gradient_accumulation_steps)

    @property
    def total_steps(self) -> int:
        if self.training.max_steps > 0:
            return self.training.max_steps
        return max(1, math.ceil(self.training.num_train_epochs * self.steps_per_epoch))

    def micro_batches(self, step: int) -> list[Batch]:
        """The micro-batches of the 0-based optimiser `step`; the last step of an epoch may have fewer."""
        epoch, index = divmod(step, self.steps_per_epoch)
        size = self.training.gradient_accumulation_steps
        return self.batches.epoch(epoch)[index * size : (index + 1) * size]


def train(
    loss_model: CausalLMLoss,
    batches: Batches,
    eval_batches: list[Batch],
    training: TrainingSpec,
    *,
    checkpoints: Path,
    compute_dtype: torch.dtype,
    memory: PeakMemory,
    on_event: OnEvent,
    should_stop: Callable[[], bool],
) -> Outcome:
    """Train what requires gradients in `loss_model`, from the newest checkpoint under `checkpoints` if there is one.

    Args:
        loss_model: The model and its loss, on the CPU or the device that `accelerate` chooses.
        batches: The training rows, in an order that depends on (seed, epoch) alone.
        eval_batches: The held-out rows; may be empty.
        training: The settings.
        checkpoints: Folder for checkpoints.
        compute_dtype: Precision of the forward pass; trained fp32 weights are cast to it on the fly (autocast).
        memory: Follows the memory of the run.
        on_event: Told what happens; see docs/architecture.md for the events.
        should_stop: Asked before every forward pass. The step in progress is given up, so the checkpoint is of whole steps.

    Raises:
        NbtuneError: The loss is no longer a number.
    """
    accelerator = Accelerator()
    device = accelerator.device
    parameters = {name: p for name, p in loss_model.named_parameters() if p.requires_grad}
    optimizer = adamw(parameters.items(), training)
    schedule = Schedule(batches, training)
    total_steps = schedule.total_steps

    start = 0
    if saved := checkpoint.checkpoints(checkpoints):
        start = checkpoint.load(saved[-1], parameters, optimizer)
    model, optimizer = accelerator.prepare(loss_model, optimizer)
    precision = _precision(loss_model, device, compute_dtype)

    loss_model.verify(**_probe(batches, device))
    if start == 0:
        _evaluate(model, eval_batches, precision, start, on_event)
    done, stopped = start, False

    model.train()
    for step in range(start, total_steps):
        began = time.perf_counter()
        micro_batches = schedule.micro_batches(step)
        num_items = sum(batch.supervised_tokens for batch in micro_batches)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total_steps, training)

        loss = torch.zeros((), device=device)
        for index, batch in enumerate(micro_batches):
            if stopped := should_stop():
                break
            with _seeded(training.seed, step, index, device), precision():
                part = model(**_tensors(batch, device), num_items=num_items)
            accelerator.backward(part)
            loss += part.detach()
        if stopped:
            break

        grad_norm = accelerator.clip_grad_norm_(parameters.values(), training.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        _require_finite(float(loss), step + 1)

        seconds = time.perf_counter() - began
        tokens = sum(batch.tokens for batch in micro_batches)
        done = step + 1
        on_event(
            {
                "type": "train",
                "step": done,
                "epoch": done / schedule.steps_per_epoch,
                "loss": float(loss),
                "learning_rate": learning_rate(step, total_steps, training),
                "grad_norm": float(grad_norm),
                "tokens": tokens,
                "tokens_per_second": tokens / seconds,
                "supervised_tokens": num_items,
                "memory_bytes": used_bytes(device),
                "peak_memory_bytes": memory.peak_bytes,
            }
        )
        last = done == total_steps
        if last or (training.eval_steps and done % training.eval_steps == 0):
            _evaluate(model, eval_batches, precision, done, on_event)
        if not last and training.save_steps and done % training.save_steps == 0:
            _save(checkpoints, done, parameters, optimizer, training, on_event)
    _save(checkpoints, done, parameters, optimizer, training, on_event)
    accelerator.free_memory()
    return Outcome(done, stopped)


@torch.no_grad()
def _evaluate(
    model: nn.Module,
    eval_batches: list[Batch],
    precision: Callable[[], AbstractContextManager[Any]],
    step: int,
    on_event: OnEvent,
) -> None:
    """Report the loss per labelled token over the held-out rows, if there are any."""
    if not eval_batches:
        return
    began = time.perf_counter()
    device = next(model.parameters()).device
    total = sum(batch.supervised_tokens for batch in eval_batches)
    model.eval()
    with precision():
        loss = sum(float(model(**_tensors(batch, device), num_items=total)) for batch in eval_batches)
    model.train()
    on_event({"type": "eval", "step": step, "eval_loss": loss, "seconds": time.perf_counter() - began})


def _save(
    folder: Path,
    step: int,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    training: TrainingSpec,
    on_event: OnEvent,
) -> None:
    path = checkpoint.save(folder, step, parameters, optimizer, training.save_total_limit)
    on_event({"type": "checkpoint", "step": step, "path": path.name})


def _tensors(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The arguments of `CausalLMLoss.forward` that come from the batch."""
    return {
        "input_ids": batch.input_ids.to(device),
        "labels": batch.labels.to(device),
        "position_ids": batch.position_ids.to(device),
        "cu_seq_lens": batch.cu_seq_lens.to(device),
        "max_length": batch.max_length,
    }


def _probe(batches: Batches, device: torch.device) -> dict[str, Any]:
    """The first tokens of the first batch: enough to see that a model's logits are what the loss assumes."""
    input_ids = batches.epoch(0)[0].input_ids[:, :16].to(device)
    length = input_ids.shape[1]
    return {
        "input_ids": input_ids,
        "position_ids": torch.arange(length, device=device)[None],
        "cu_seq_lens": torch.tensor([0, length], dtype=torch.int32, device=device),
        "max_length": length,
    }


def _precision(
    model: nn.Module, device: torch.device, compute_dtype: torch.dtype
) -> Callable[[], AbstractContextManager[Any]]:
    """Autocast where fp32 weights are to be computed with in half precision (full fine-tuning); nothing otherwise."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes == {torch.float32} and compute_dtype != torch.float32:
        return lambda: torch.autocast(device.type, compute_dtype)
    return nullcontext


@contextmanager
def _seeded(seed: int, step: int, micro_step: int, device: torch.device) -> Iterator[None]:
    """Random numbers of (seed, step, micro_step), leaving the caller's generator as it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(hash((seed, step, micro_step)) & 0x7FFF_FFFF_FFFF_FFFF)
        yield


def _require_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise NbtuneError(
            f"The loss became {loss} at step {step}",
            "The weights of this step are spoiled; the last checkpoint is not.",
            "Lower the learning rate or max_grad_norm, or train in float32, and start again.",
        )
