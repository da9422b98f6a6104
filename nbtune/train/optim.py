"""The optimiser, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from nbtune.modules.quantised import bitsandbytes
from nbtune.peft import PeftModel
from nbtune.peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from nbtune.spec import TrainingSpec


def build_optimizer(model: nn.Module, adapted: PeftModel | None, training: TrainingSpec) -> Optimizer:
    """The optimiser of what requires gradients in `model`; each group's `lr_ratio` times the schedule is its rate.

    LoRA-FA freezes parameters of `adapted`; a spec names it, and LoRA+, only for adapters.
    """
    if training.optim == "lorafa":
        assert adapted is not None
        optimizer: Optimizer = create_lorafa_optimizer(
            adapted,
            r=1,  # not read
            lora_alpha=1,
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
        )
    elif training.loraplus_lr_ratio is not None:
        assert adapted is not None
        kind, options = _adamw_class(training)
        optimizer = create_loraplus_optimizer(
            adapted,
            kind,
            loraplus_lr_ratio=training.loraplus_lr_ratio,
            loraplus_weight_decay=training.weight_decay,
            **options,
        )
    else:
        optimizer = adamw(((n, p) for n, p in model.named_parameters() if p.requires_grad), training)
    for group in optimizer.param_groups:
        group["lr_ratio"] = group["lr"] / training.learning_rate
    return optimizer


def adamw(parameters: Iterable[tuple[str, nn.Parameter]], training: TrainingSpec) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over named parameters; vectors and scalars do not decay."""
    matrices, vectors = [], []
    for _, parameter in parameters:
        (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    kind, options = _adamw_class(training)
    return kind([group for group in groups if group["params"]], **options)


def _adamw_class(training: TrainingSpec) -> tuple[Any, dict[str, Any]]:
    """The class of AdamW that `training.optim` names, and its settings.

    bitsandbytes' keep their averages as bytes with a scale per 256 (Dettmers et al. 2022, arXiv:2110.02861), or in
    memory that the driver moves between GPU and host as it is used.
    """
    options: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
    }
    if training.optim == "adamw_torch_fused":
        return AdamW, {**options, "fused": True}
    optim = bitsandbytes().optim
    classes = {
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw_32bit": optim.PagedAdamW32bit,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
    }
    return classes[training.optim], options


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
