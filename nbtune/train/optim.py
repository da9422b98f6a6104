"""The optimiser, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW, Optimizer

from nbtune.peft import PeftModel
from nbtune.peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from nbtune.spec import TrainingSpec


def build_optimizer(model: nn.Module, adapted: PeftModel | None, training: TrainingSpec) -> Optimizer:
    """The optimiser of what requires gradients in `model`; each group's `lr_ratio` times the schedule is its rate.

    LoRA-FA freezes parameters of `adapted`; a spec names it, and LoRA+, only for adapters.
    """
    betas = (training.adam_beta1, training.adam_beta2)
    if training.optim == "adamw_torch_fused" and training.loraplus_lr_ratio is None:
        optimizer: Optimizer = adamw(((n, p) for n, p in model.named_parameters() if p.requires_grad), training)
        return _with_ratios(optimizer, training)
    assert adapted is not None
    if training.optim == "lorafa":
        optimizer = create_lorafa_optimizer(
            adapted,
            r=1,  # not read
            lora_alpha=1,
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            betas=betas,
            eps=training.adam_epsilon,
        )
    else:
        optimizer = create_loraplus_optimizer(
            adapted,
            AdamW,
            lr=training.learning_rate,
            loraplus_lr_ratio=training.loraplus_lr_ratio or 1.0,
            loraplus_weight_decay=training.weight_decay,
            betas=betas,
            eps=training.adam_epsilon,
            fused=True,
        )
    return _with_ratios(optimizer, training)


def _with_ratios(optimizer: Optimizer, training: TrainingSpec) -> Optimizer:
    for group in optimizer.param_groups:
        group["lr_ratio"] = group["lr"] / training.learning_rate
    return optimizer


def adamw(parameters: Iterable[tuple[str, nn.Parameter]], training: TrainingSpec) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over named parameters; vectors and scalars do not decay."""
    matrices, vectors = [], []
    for _, parameter in parameters:
        (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=True,
    )


def learning_rate(step: int, total_steps: int, training: TrainingSpec) -> float:
    """The rate of the 0-based `step`, as transformers' schedules give it.

    A pure function, so a resumed run needs no scheduler state. `constant` has no warm-up.
    """
    peak = training.learning_rate
    if training.lr_scheduler_type == "constant":
        return peak
    warmup = math.ceil(training.warmup_ratio * total_steps)
    if step < warmup:
        return peak * step / warmup
    if training.lr_scheduler_type == "constant_with_warmup":
        return peak
    done = (step - warmup) / max(1, total_steps - warmup)
    return peak * (1 - done if training.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
