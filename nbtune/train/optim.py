"""The optimiser, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW

from nbtune.spec import TrainingSpec


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
