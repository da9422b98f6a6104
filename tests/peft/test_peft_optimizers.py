"""LoRA+ and LoRA-FA against `peft.optimizers`."""

from __future__ import annotations

import peft
import peft.optimizers
import pytest
import torch
from grid import trained

from nbtune.errors import AdapterError
from nbtune.peft import LoraConfig, PeftModel, get_peft_model
from nbtune.peft.configs.rotations import OFTConfig
from nbtune.peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer


@pytest.fixture
def pair(make, tmp_path):
    """`pair(name, **settings)`: the same new adapter here and in PEFT."""

    def build(name="llama", **settings):
        theirs = peft.get_peft_model(make(name), peft.LoraConfig(r=4, lora_alpha=16, **settings))
        theirs.save_pretrained(tmp_path)
        return PeftModel.from_pretrained(make(name), tmp_path, is_trainable=True), theirs

    return build


CASES = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["embed_tokens", "down_proj"], "use_rslora": True},
    {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"], "use_dora": True},
]


@pytest.mark.parametrize("settings", CASES)
def test_loraplus_groups_and_losses_are_those_of_peft(pair, settings):
    models, kwargs = pair(**settings), {"lr": 3e-3, "loraplus_lr_ratio": 8.0, "loraplus_weight_decay": 0.1}
    mine, theirs = (
        create(model, torch.optim.AdamW, **kwargs)
        for create, model in zip(
            (create_loraplus_optimizer, peft.optimizers.create_loraplus_optimizer), models, strict=True
        )
    )
    shapes = [
        [(g["lr"], g["weight_decay"], sorted(p.numel() for p in g["params"])) for g in optimizer.param_groups]
        for optimizer in (mine, theirs)
    ]
    assert shapes[0] == shapes[1]
    losses = [trained(model, optimizer) for model, optimizer in zip(models, (mine, theirs), strict=True)]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=0)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("settings", [*CASES[:2], {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}])
def test_lorafa_losses_are_those_of_peft_in_fp32(pair, settings, monkeypatch):
    """PEFT multiplies in bf16 where it can; its formula in fp32 is ours."""
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    ours, theirs = pair(**settings)
    arguments = {"r": 4, "lora_alpha": 16, "lr": 5e-3, "weight_decay": 0.05}
    optimizer = create_lorafa_optimizer(ours, **arguments)
    before = {name: p.clone() for name, p in ours.named_parameters() if "lora_A" in name}
    mine = trained(ours, optimizer)
    expected = trained(theirs, peft.optimizers.create_lorafa_optimizer(theirs, **arguments))
    torch.testing.assert_close(mine, expected, atol=1e-4, rtol=0)
    assert mine[-1] < mine[0]
    assert before
    assert all(torch.equal(ours.get_parameter(name), value) for name, value in before.items())


def test_lorafa_trains_dora_too(pair):
    """PEFT takes the factors and the magnitude in pairs, and fails."""
    ours, theirs = pair(**CASES[2])
    losses = trained(ours, create_lorafa_optimizer(ours, 4, 16, lr=5e-3))
    assert losses[-1] < losses[0]
    with pytest.raises(TypeError, match="unsupported operand"):
        trained(theirs, peft.optimizers.create_lorafa_optimizer(theirs, 4, 16, lr=5e-3))


def test_lorafa_rescales_to_the_gradient_of_the_weight(make):
    """Its theorem: (s g_W A') (A A')^-1 / s^2 times s A is g_W projected on A's rows."""
    ours = get_peft_model(make("llama"), LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"]))
    optimizer = create_lorafa_optimizer(ours, 4, 12, lr=1e-3)
    layer = ours._adapters("default")["model.layers.0.self_attn.q_proj"]
    g = torch.randn(32, 32, dtype=torch.float64)
    A = layer.lora_A.double()
    layer.lora_B.grad = (layer.scaling * g @ A.T).float()
    rescaled = optimizer._gradient(layer.lora_B).double()
    projected = g @ A.T @ torch.linalg.inv(A @ A.T) @ A
    torch.testing.assert_close(layer.scaling * rescaled @ A, projected, atol=1e-4, rtol=1e-4)


def test_what_cannot_be(make):
    ours = get_peft_model(make("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="use_rslora is True; the adapters default were made otherwise"):
        create_lorafa_optimizer(ours, 8, 8, lr=1e-3, use_rslora=True)
    with pytest.raises(AdapterError, match="loraplus_lr_ratio is 0; it must be more than 0"):
        create_loraplus_optimizer(ours, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=0)
    with pytest.raises(AdapterError, match="trains LoRA's B"):
        create_lorafa_optimizer(get_peft_model(make("llama"), OFTConfig(oft_block_size=4)), 8, 8, lr=1e-3)
