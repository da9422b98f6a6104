"""The training loop, top to bottom.

Everything random or scheduled is a function of (seed, step): the order of the rows, the learning rate, dropout. So a
checkpoint is the weights, the optimiser and the step, and a resumed run computes what an uninterrupted one would have.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nbtune.data import Batch
from nbtune.data.packing import IGNORED
from nbtune.errors import NbtuneError
from nbtune.kernels.casts import casts_kept
from nbtune.models.training import precision
from nbtune.peft import PeftModel
from nbtune.spec import TrainingSpec
from nbtune.train import checkpoint
from nbtune.train.accelerator import own_accelerator
from nbtune.train.compiled import compile_and_time
from nbtune.train.control import wait_while
from nbtune.train.events import Event
from nbtune.train.loss import CausalLMLoss
from nbtune.train.memory import PeakMemory, release, trim_heap, used_bytes, wait_for
from nbtune.train.optim import build_optimizer, learning_rate
from nbtune.train.room import Room, is_out_of_memory
from nbtune.train.samples import Sampler, report_samples
from nbtune.train.schedule import Schedule
from nbtune.train.sharding import whole
from nbtune.train.world import ALONE, World

OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Outcome:
    """Where the loop ended: after `step` optimiser steps, and whether because it was asked to stop."""

    step: int
    stopped: bool


def train(
    loss_model: CausalLMLoss,
    adapted: PeftModel | None,
    schedule: Schedule,
    held_out: list[Batch],
    training: TrainingSpec,
    *,
    checkpoints: Path,
    compute_dtype: torch.dtype,
    memory: PeakMemory,
    room: Room,
    on_event: OnEvent,
    should_stop: Callable[[], bool],
    should_pause: Callable[[], bool] = lambda: False,
    sampler: Sampler | None = None,
    world: World = ALONE,
) -> Outcome:
    """Train what requires gradients in `loss_model`, from the newest checkpoint under `checkpoints` if there is one.

    Args:
        loss_model: The model and its loss, on the device to train on.
        adapted: The same model with its adapter; None where every weight is trained.
        schedule: The training batches of every step.
        held_out: The held-out batches; may be empty.
        training: The settings.
        checkpoints: Folder for checkpoints.
        compute_dtype: Precision of the forward pass; trained fp32 weights are cast to it on the fly (autocast).
        memory: Follows the memory of the run.
        room: Lays the steps out, smaller once memory runs out; the step in which it does is done again.
        on_event: Told what happens; see docs/architecture.md for the events.
        should_stop: Asked before every forward pass. The step in progress is given up: checkpoints are of whole steps.
            Several processes are asked before every step, as they are whether to pause.
        should_pause: Asked before every step, and while the loop waits as long as it says yes.
        sampler: Answers a few questions at each evaluation.
        world: The processes that train this run together.

    Raises:
        NbtuneError: The loss is no longer a number, or one example is too much for the memory.
    """
    accelerator = own_accelerator()
    device = next(loss_model.parameters()).device
    optimizer = build_optimizer(loss_model, adapted, training)
    parameters = {name: p for name, p in loss_model.named_parameters() if p.requires_grad}
    # What AdaLoRA remembers of the steps so far.
    followed = {name: buffer for name, buffer in loss_model.named_buffers() if ".importance_" in name}
    state = {**parameters, **followed}
    total_steps = schedule.total_steps

    start = 0
    # Before the checkpoint: this would take a paged optimiser's averages out of their pages.
    model, prepared = accelerator.prepare(loss_model, optimizer)
    if saved := checkpoint.checkpoints(checkpoints):
        start = checkpoint.load(saved[-1], state, optimizer)
    world.require_one_start(start)
    world.equalise(state.values())
    in_precision = functools.partial(precision, loss_model, device.type, compute_dtype)

    def evaluate(step: int) -> None:
        _evaluate(model, held_out, in_precision, step, on_event, world)
        if sampler is not None:
            with in_precision():
                loss_model.within(functools.partial(report_samples, sampler, step, on_event))

    loss_model.verify(**_probe(schedule, device))
    if start == 0:
        evaluate(start)
    done, stopped = start, False

    def accumulate(step: int, batches: list[Batch], num_items: int) -> Tensor | Batch | None:
        """Add up the gradients of a step: its loss, correct tokens and entropy [3]; or the batch in which memory ran
        out; or None if asked to stop.
        """
        sums = torch.zeros(3, dtype=torch.float32, device=device)
        for index, batch in enumerate(batches):
            if world.alone and should_stop():
                return None
            number = index * world.size + world.rank  # among the micro-batches of all processes
            try:
                with _seeded(training.seed, step, number, device), in_precision():
                    output = model(**_tensors(batch, device), num_items=num_items)
                sums += torch.stack(output).detach()
                penalty = adapted.penalty() if adapted is not None and number == 0 else None  # once a step
                accelerator.backward(output.loss if penalty is None else output.loss + penalty)
                if device.type == "cpu":
                    trim_heap()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or world.in_step:
                    raise
                return batch
        return sums

    if not world.in_step:  # casts of sharded weights would be the whole model after all
        accumulate = casts_kept()(accumulate)
    model.train()
    if training.torch_compile:
        batches = room.micro_batches(schedule.micro_batches(0))

        def one_pass() -> None:
            accumulate(0, batches[:1], _supervised(batches[0]))
            prepared.zero_grad()
            wait_for(device)

        on_event({"type": "status", "message": "compiling the blocks"})
        on_event(compile_and_time(loss_model.model, one_pass, len(batches), total_steps - start))
    should_pause, stops_here = world.agreed(should_pause), world.agreed(should_stop)
    for step in range(start, total_steps):
        if should_pause():
            _save(checkpoints, step, state, optimizer, training, on_event, world)
            wait_while(should_pause, step, on_event)
        if stopped := not world.alone and stops_here():
            break
        began = time.perf_counter()
        micro_batches = schedule.micro_batches(step)
        num_items = sum(_supervised(batch) for batch in micro_batches)
        for group in optimizer.param_groups:
            group["lr"] = group["lr_ratio"] * learning_rate(step, total_steps, training)

        own = world.share(micro_batches)
        while world.any(isinstance(sums := accumulate(step, room.micro_batches(own), num_items), Batch)):
            prepared.zero_grad()
            release(device)
            if not isinstance(sums, Batch):
                continue  # memory ran out in another process
            how = room.give_way(sums, memory.peak_bytes)
            on_event({"type": "warning", "message": f"Memory ran out in step {step + 1}, which is done again: {how}."})
        if stopped := sums is None:
            break
        assert isinstance(sums, Tensor)

        sums = world.sum(sums)
        sent = world.sum_gradients(parameters.values())
        grad_norm = accelerator.clip_grad_norm_(parameters.values(), training.max_grad_norm or math.inf)
        assert grad_norm is not None
        prepared.step()
        if adapted is not None:
            adapted.update_and_allocate(step)
        prepared.zero_grad()
        loss, correct, entropy = sums.tolist()
        _require_finite(loss, step + 1)

        seconds = time.perf_counter() - began
        tokens = sum(batch.tokens for batch in micro_batches)
        done = step + 1
        on_event(
            {
                "type": "train",
                "step": done,
                "epoch": done / schedule.steps_per_epoch,
                "loss": loss,
                "mean_token_accuracy": correct / num_items,
                "entropy": entropy / num_items,
                "learning_rate": learning_rate(step, total_steps, training),
                "grad_norm": float(whole(grad_norm)),
                "tokens": tokens,
                "tokens_per_second": tokens / seconds,
                "supervised_tokens": num_items,
                "memory_bytes": used_bytes(device),
                "peak_memory_bytes": memory.peak_bytes,
                **({"sent_bytes": sent} if sent else {}),
            }
        )
        last = done == total_steps
        if last or (training.eval_steps and done % training.eval_steps == 0):
            evaluate(done)
        if not last and training.save_steps and done % training.save_steps == 0:
            _save(checkpoints, done, state, optimizer, training, on_event, world)
    _save(checkpoints, done, state, optimizer, training, on_event, world)
    accelerator.free_memory()
    return Outcome(done, stopped)


@torch.no_grad()
def _evaluate(
    model: nn.Module,
    held_out: list[Batch],
    precision: Callable[[], AbstractContextManager[Any]],
    step: int,
    on_event: OnEvent,
    world: World,
) -> None:
    """Report the loss and the accuracy per labelled token over the held-out rows, if there are any."""
    if not held_out:
        return
    began = time.perf_counter()
    device = next(model.parameters()).device
    total = sum(_supervised(batch) for batch in held_out)
    model.eval()
    with precision():
        parts = [torch.stack(model(**_tensors(batch, device), num_items=total)) for batch in world.share(held_out)]
    model.train()
    sums = torch.stack(parts).sum(0) if parts else torch.zeros(3)  # there may be fewer batches than processes
    loss, correct, _ = world.sum(sums).tolist()
    on_event(
        {
            "type": "eval",
            "step": step,
            "eval_loss": loss,
            "eval_mean_token_accuracy": correct / total,
            "seconds": time.perf_counter() - began,
        }
    )


def _save(
    folder: Path,
    step: int,
    state: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    training: TrainingSpec,
    on_event: OnEvent,
    world: World,
) -> None:
    if not (world.is_first or world.in_step):
        return
    path = checkpoint.save(folder, step, state, optimizer, training.save_total_limit, writes=world.is_first)
    on_event({"type": "checkpoint", "step": step, "path": path.name})


def _tensors(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The arguments of `CausalLMLoss.forward` that come from the batch."""
    return {
        "input_ids": batch.input_ids.to(device),
        "labels": batch.labels.to(device),
        "position_ids": batch.position_ids.to(device),
        "cu_seq_lens": batch.cu_seq_lens,  # read on the host, once a layer
        "max_length": batch.max_length,
    }


def _supervised(batch: Batch) -> int:
    return int((batch.labels != IGNORED).sum())


def _probe(schedule: Schedule, device: torch.device) -> dict[str, Any]:
    """The first tokens of the first batch: enough to see that a model's logits are what the loss assumes."""
    input_ids = schedule.micro_batches(0)[0].input_ids[:, :16].to(device)
    length = input_ids.shape[1]
    return {
        "input_ids": input_ids,
        "position_ids": torch.arange(length, device=device)[None],
        "cu_seq_lens": torch.tensor([0, length], dtype=torch.int32),
        "max_length": length,
    }


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
