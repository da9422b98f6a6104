"""What both sides of a benchmark share: the model's folder, LoRA's settings and first weights, the FLOP of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MODEL = "smollm2-135m-instruct"
RANK = 16
SETTINGS = {"r": RANK, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def folder(model: str) -> Path:
    """The model as transformers reads it; the packaged one is converted where this was not done before."""
    from nbtune.models.source import fetch, resolve
    from nbtune.spec import ModelSpec

    return fetch(resolve(ModelSpec(name=model)))


def first_weights(state: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """LoRA's first weights for an adapter file's names and shapes, the same numbers whoever made the adapter."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name in sorted(state):
        bound = 1 / math.sqrt(state[name].shape[1])  # peft's kaiming_uniform_ with a = sqrt(5)
        drawn = torch.empty(state[name].shape).uniform_(-bound, bound, generator=generator)
        weights[name] = drawn if ".lora_A." in name else torch.zeros_like(drawn)
    return weights


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def touch(model: nn.Module) -> None:
    """Read every weight once: weights that are mapped from a file are then in memory, and count as loaded."""
    for parameter in model.parameters():
        parameter.detach().sum()


def step_flops(config: Any, lengths: list[int], predicted: int) -> float:
    """Model FLOP of a LoRA step on segments of `lengths` tokens: what no implementation can do without.

    For each token and weight of the layers two in the forward pass and two in the backward pass (the base is frozen),
    for the head's only of the `predicted` tokens; six for LoRA's; causal attention forward and twice that backward.
    """
    width, inner, head = config.hidden_size, config.intermediate_size, config.hidden_size // config.num_attention_heads
    keys = config.num_key_value_heads * head
    shapes = [(width, width), (width, keys), (width, keys), (width, width)]
    shapes += [(width, inner), (width, inner), (inner, width)]
    base = 4 * sum(rows * columns for rows, columns in shapes)
    low_rank = 6 * RANK * sum(rows + columns for rows, columns in shapes)
    layers = config.num_hidden_layers * (base + low_rank) * sum(lengths)
    attention = config.num_hidden_layers * 6 * width * sum(length**2 for length in lengths)
    return float(layers + attention + 4 * width * config.vocab_size * predicted)
