"""The training core with every method: a packed row gives the loss and the gradients of each example alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grid import disturb
from test_peft_wrong_results import SETTINGS, TARGETS
from tiny_models import llama
from torch import Tensor

import nbtune.peft
from nbtune.kernels.attention import NAME, register
from nbtune.peft import PeftConfig, PeftModel, get_peft_model
from nbtune.train.loss import CausalLMLoss

LENGTHS = [5, 1, 9, 7]
# Prompts are in tests/train/test_prompt_training.py.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {"target_modules": TARGETS, **settings}) for name, settings in SETTINGS.items()},
    "LNTuningConfig": ("LNTuningConfig", {}),
    "TrainableTokensConfig": ("TrainableTokensConfig", {"token_indices": [3, 50, 95]}),
    "DoRA": ("LoraConfig", {"r": 4, "target_modules": TARGETS, "use_dora": True}),
    "embedding and head": ("LoraConfig", {"r": 4, "target_modules": ["embed_tokens", "lm_head"]}),
    "tokens and a saved head": (
        "LoraConfig",
        {"r": 4, "target_modules": TARGETS, "trainable_token_indices": [3, 50], "modules_to_save": ["lm_head"]},
    ),
}


def config_of(setup: str) -> PeftConfig:
    name, settings = CASES[setup]
    return getattr(nbtune.peft, name)(**settings)


def row() -> dict[str, Any]:
    """Four examples in a row, the first token of each and some others without a label."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, 96, (1, sum(LENGTHS)), generator=generator)
    input_ids[0, ::4] = torch.tensor([3, 50, 95]).repeat(2)
    labels = torch.where(torch.rand(input_ids.shape, generator=generator) < 0.3, -100, input_ids)
    borders = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    labels[0, borders[:-1].long()] = -100
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": positions,
        "cu_seq_lens": borders,
        "max_length": max(LENGTHS),
    }


def one_at_a_time(model: PeftModel, packed: dict[str, Any]) -> Tensor:
    """The loss of each example alone by transformers, weighted by its labels."""
    base: Any = model.get_base_model()
    base.set_attn_implementation("sdpa")
    examples = zip(packed["input_ids"].split(LENGTHS, 1), packed["labels"].split(LENGTHS, 1), strict=True)
    counted = [(base(ids, labels=labels).loss, (labels[:, 1:] != -100).sum()) for ids, labels in examples]
    total = torch.stack([loss * count for loss, count in counted if count]).sum()
    return total / sum(count for _, count in counted)


def gradients(model: PeftModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("setup", CASES)
def test_a_packed_row_is_each_example_alone(setup):
    register()
    model = get_peft_model(llama(hidden_size=64, intermediate_size=64, num_attention_heads=2), config_of(setup))
    disturb(model.train(), 0.05)
    packed = row()
    expected = one_at_a_time(model, packed)
    wanted = gradients(model, expected)
    base: Any = model.get_base_model()
    base.set_attn_implementation(NAME)
    loss = CausalLMLoss(base)(**packed).loss
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    found = gradients(model, loss)
    assert found.keys() == wanted.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-5, msg=name)
    assert max(gradient.abs().max() for gradient in found.values()) > 1e-4
    with model.disable_adapter():
        assert abs(CausalLMLoss(base)(**packed).loss.item() - loss.item()) > 1e-5
