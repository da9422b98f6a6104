"""Prompts before packed examples: as if each example had been computed alone, on tiny models and in real runs."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from nbtune.kernels.attention import NAME, register
from nbtune.peft import LoraConfig, PeftModel, get_peft_model
from nbtune.peft.configs.p_tuning import PromptEncoderConfig
from nbtune.peft.configs.prefix_tuning import PrefixTuningConfig
from nbtune.peft.configs.prompt_tuning import PromptTuningConfig
from nbtune.train.loss import CausalLMLoss

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
ARCHITECTURES = {
    "Llama": SIZES,
    # Of the prefix of 5 keys a window of 4 shows its last 3 to the first token, and none to the fourth.
    "Gemma3Text": {**SIZES, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    | {"num_hidden_layers": 4, "final_logit_softcapping": 5.0},
    "GPT2": {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
CONFIGS = {
    "prompt": PromptTuningConfig(num_virtual_tokens=5),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16),
    "prefix": PrefixTuningConfig(num_virtual_tokens=5),
    "projected prefix": PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16),
}
LENGTHS = [5, 1, 9, 7]


def adapted_model(architecture: str, config) -> PeftModel:
    register()
    torch.manual_seed(0)
    kind = getattr(transformers, f"{architecture}Config")(**ARCHITECTURES[architecture])
    model = transformers.AutoModelForCausalLM.from_config(kind, attn_implementation="sdpa")
    return get_peft_model(model, config)


def packed_row(seed: int = 1) -> dict:
    """Four examples in a row, the first token of each and some others without a label."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(64, (1, sum(LENGTHS)), generator=generator)
    labels = torch.where(torch.rand(input_ids.shape, generator=generator) < 0.3, -100, input_ids)
    borders = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    labels[0, borders[:-1].long()] = -100
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "cu_seq_lens": borders,
        "max_length": max(LENGTHS),
    }


def one_at_a_time(model: PeftModel, row: dict) -> torch.Tensor:
    """The loss of each example alone by PeftModel.forward, weighted by its labels."""
    model.get_base_model().set_attn_implementation("sdpa")
    parts = zip(row["input_ids"].split(LENGTHS, 1), row["labels"].split(LENGTHS, 1), strict=True)
    counted = [(model(ids, labels=labels).loss, (labels[:, 1:] != -100).sum()) for ids, labels in parts]
    return sum(loss * count for loss, count in counted if count) / sum(count for _, count in counted)


def packed_loss(model: PeftModel, row: dict) -> torch.Tensor:
    model.get_base_model().set_attn_implementation(NAME)
    return CausalLMLoss(model.get_base_model())(**row)


def gradients(model: PeftModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", CONFIGS)
def test_a_packed_row_is_each_example_alone(architecture, method):
    model, row = adapted_model(architecture, CONFIGS[method]).train(), packed_row()
    expected = one_at_a_time(model, row)
    wanted = gradients(model, expected)
    loss = packed_loss(model, row)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    found = gradients(model, loss)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-5, msg=name)
    with model.disable_adapter():
        assert abs(packed_loss(model, row).item() - loss.item()) > 1e-3


@pytest.mark.parametrize("method", CONFIGS)
def test_ten_steps_lower_the_loss(method):
    model, row = adapted_model("Llama", CONFIGS[method]).train(), packed_row()
    before = copy.deepcopy(model.get_base_model().model.layers[0].state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = packed_loss(model, row)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    after = model.get_base_model().model.layers[0].state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("method", CONFIGS)
def test_gradient_checkpointing_changes_nothing(method):
    model, row = adapted_model("Llama", CONFIGS[method]).train(), packed_row()
    expected = packed_loss(model, row)
    wanted = gradients(model, expected)
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    loss = packed_loss(model, row)
    assert loss.item() == expected.item()
    for name, gradient in gradients(model, loss).items():
        assert torch.equal(gradient, wanted[name]), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_the_logits_are_verified_with_the_prompt(architecture, method):
    model, row = adapted_model(architecture, CONFIGS[method]).eval(), packed_row()
    model.get_base_model().set_attn_implementation(NAME)
    row.pop("labels")
    CausalLMLoss(model.get_base_model()).verify(**row)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_prompt_and_low_rank_updates_are_active_together(method):
    model, row = adapted_model("Llama", CONFIGS[method]).train(), packed_row()
    model.add_adapter("low_rank", LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.set_adapter(["default", "low_rank"])
    expected = one_at_a_time(model, row)
    wanted = gradients(model, expected)
    for name, gradient in gradients(model, packed_loss(model, row)).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-5, msg=name)
