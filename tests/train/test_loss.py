"""The loss past the logits against transformers' own, for architectures that treat their logits differently."""

import pytest
import torch
import transformers

from nbtune.errors import ModelError
from nbtune.kernels.attention import NAME, register
from nbtune.peft import LoraConfig, get_peft_model
from nbtune.train.loss import CausalLMLoss

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
ARCHITECTURES = {
    "Llama": {},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "Gemma3Text": {"final_logit_softcapping": 5.0, "sliding_window": 4},
    "Qwen3": {"tie_word_embeddings": True},
}
LENGTHS = [5, 9, 7]


def model_of(name):
    register()
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | ARCHITECTURES[name])
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def packed():
    """Three segments in a row, the first token of each and some others without a label."""
    torch.manual_seed(1)
    input_ids = torch.randint(64, (1, sum(LENGTHS)))
    labels = torch.where(torch.rand(input_ids.shape) < 0.3, -100, input_ids)
    borders = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    labels[0, borders[:-1].long()] = -100
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "cu_seq_lens": borders,
        "max_length": max(LENGTHS),
    }


def theirs(model, batch):
    """transformers' loss of each segment alone, weighted by its labels."""
    parts = zip(batch["input_ids"].split(LENGTHS, 1), batch["labels"].split(LENGTHS, 1), strict=True)
    counted = [(model(ids, labels=labels).loss, (labels[:, 1:] != -100).sum()) for ids, labels in parts]
    return sum(loss * count for loss, count in counted) / sum(count for _, count in counted)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_transformers_loss_and_gradients(name):
    model, batch = model_of(name), packed()
    expected = theirs(model, batch)
    expected.backward()
    gradients = {
        key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()

    model.set_attn_implementation(NAME)
    loss = CausalLMLoss(model)(**batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for key, parameter in model.named_parameters():
        if key in gradients:
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-6, msg=key)


def test_an_adapted_head_takes_part():
    model, batch = model_of("Llama"), packed()
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    expected = theirs(adapted, batch)
    model.set_attn_implementation(NAME)
    loss = CausalLMLoss(model)(**batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_known_architectures_are_verified(name):
    model, batch = model_of(name), packed()
    model.set_attn_implementation(NAME)
    batch.pop("labels")
    CausalLMLoss(model).verify(**batch)


def test_logits_that_are_more_than_the_heads_product_are_refused():
    model, batch = model_of("Cohere"), packed()
    model.set_attn_implementation(NAME)
    batch.pop("labels")
    loss = CausalLMLoss(model)
    loss.scale = 1.0  # as if the setting of the architecture were not known
    with pytest.raises(ModelError, match="cannot be trained yet"):
        loss.verify(**batch)
