"""LoRA in all its forms, by the invariants of every method."""

from __future__ import annotations

import peft
import pytest
import torch
from grid import MethodTests, close, disturb
from torch import nn

from nbtune.errors import AdapterError
from nbtune.peft import LoraConfig, PeftModel, get_peft_model


class TestLora(MethodTests):
    thorough = True
    config, oracle = LoraConfig, peft.LoraConfig
    cases = [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 4, "rank_pattern": {"down_proj": 3}}),
        ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"], "use_rslora": True}),
        (
            "gpt2",
            {"target_modules": ["c_attn", "c_proj"], "r": 4, "alpha_pattern": {"c_attn": 20}, "bias": "lora_only"},
        ),
        ("t5", {"target_modules": ["q", "wo"], "r": 4, "lora_alpha": 3}),
        ("bert", {"target_modules": ["query", "dense"], "r": 4, "bias": "all"}),
        ("bert", {"target_modules": ["query"], "r": 4, "task_type": "SEQ_CLS"}),
        ("bert", {"target_modules": ["query", "dense"], "r": 4, "lora_bias": True}),
        ("gpt2", {"target_modules": ["wte", "c_attn"], "r": 4}),
    ]


class TestDora(MethodTests):
    config, oracle = LoraConfig, peft.LoraConfig
    cases = [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 4, "use_dora": True, "lora_alpha": 16}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 4, "use_dora": True, "use_rslora": True}),
        ("t5", {"target_modules": ["q", "wo"], "r": 4, "use_dora": True}),
        ("bert", {"target_modules": ["query", "dense"], "r": 4, "use_dora": True, "bias": "lora_only"}),
    ]


class TestInits(MethodTests):
    thorough = True
    config, oracle = LoraConfig, peft.LoraConfig
    learning_rate = 1e-3  # PiSSA starts from large weights
    adds = False  # PEFT takes the second adapter's start out of what the first has left of the base
    cases = [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 4, "init_lora_weights": "pissa"}),
        ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 4, "init_lora_weights": "olora"}),
        ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 4, "init_lora_weights": "orthogonal"}),
        ("bert", {"target_modules": ["query", "dense"], "r": 4, "init_lora_weights": "gaussian"}),
        ("bert", {"target_modules": ["query", "dense"], "r": 4, "init_lora_weights": "pissa", "lora_alpha": 2}),
    ]


CONVOLUTIONS = {
    "1d": (nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 11)),
    "2d": (nn.Conv2d(6, 8, (3, 2), padding=1, bias=False), (2, 6, 7, 5)),
    "3d": (nn.Conv3d(6, 8, 2), (2, 6, 4, 5, 3)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_convolutions(kind, dora, lora_bias, tmp_path):
    layer, shape = CONVOLUTIONS[kind]
    if lora_bias and dora:
        with pytest.raises(AdapterError, match="DoRA has no place for a bias"):
            LoraConfig(use_dora=True, lora_bias=True)
        return
    x = torch.randn(shape)

    def make():
        return nn.Sequential(nn.Identity(), nn.Conv1d(1, 1, 1), nn.Linear(1, 1)).append(_copy(layer))

    settings = {"target_modules": ["3"], "r": 4, "use_dora": dora, "lora_bias": lora_bias, "lora_alpha": 3}
    ours = get_peft_model(make(), LoraConfig(**settings))
    disturb(ours, 0.1)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    mine, expected = ours.get_base_model()[3](x), theirs.base_model.model[3](x)
    close(mine, expected)
    assert (mine - layer(x)).abs().max() > 1e-2
    ours.merge_adapter()
    close(ours.get_base_model()[3](x), mine)
    ours.unmerge_adapter()
    ours.add_adapter("b", LoraConfig(**settings))
    disturb(ours, 0.1, 7)
    with ours._rows(["b", "__base__"]):
        rows = ours.get_base_model()[3](x)
    ours.set_adapter("b")
    close(rows, torch.stack([ours.get_base_model()[3](x)[0], layer(x)[1]]))


def _copy(layer: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(layer)


def test_grouped_convolutions_are_refused_by_name():
    with pytest.raises(AdapterError, match="0 is a convolution in 2 groups"):
        get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), LoraConfig(target_modules=["0"]))


def test_an_embedding_with_dora_loads_in_peft(make, ids, tmp_path):
    ours = get_peft_model(make("gpt2"), LoraConfig(r=4, target_modules=["wte"], use_dora=True)).eval()
    disturb(ours, 0.1)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make("gpt2"), tmp_path)
    close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    before = ours(input_ids=ids).logits
    ours.merge_adapter()
    close(ours(input_ids=ids).logits, before)


@pytest.mark.parametrize("init", ["pissa_niter_8", "loftq"])
def test_inits_that_change_the_base_in_peft_leave_it_alone_here(make, ids, init):
    base = make()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init)).eval()
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, make()(input_ids=ids).logits)
    if init == "loftq":
        assert (model(input_ids=ids).logits - make()(input_ids=ids).logits).abs().max() > 1e-4  # it is a 4-bit model
    else:
        close(model(input_ids=ids).logits, make()(input_ids=ids).logits)
    disturb(model, 0.05)
    expected = model(input_ids=ids).logits
    model.merge_adapter()
    close(model(input_ids=ids).logits, expected)


def test_dropout_on_every_form(make, ids):
    for settings in ({}, {"use_dora": True}, {"init_lora_weights": "pissa"}):
        config = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5, **settings)
        model = get_peft_model(make(), config)
        disturb(model, 0.2)
        model.train()
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
        model.eval()
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_pissa_adapter_comes_back_from_its_file(make, ids, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa_niter_4")
    model = get_peft_model(make(), config).eval()
    disturb(model, 0.1)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
