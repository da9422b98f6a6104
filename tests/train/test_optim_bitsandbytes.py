"""8-bit and paged AdamW against torch's: the same curve, the bytes that are promised, every bit back after a resume."""

import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from nbtune.errors import RunError
from nbtune.peft import LoraConfig, get_peft_model
from nbtune.spec import TrainingSpec
from nbtune.train import checkpoint
from nbtune.train.optim import build_optimizer

NAMES = ["adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def teacher(device="cpu"):
    """Inputs [64, 96] and what a fixed network says to them."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(64, 96, generator=generator)
    return x.to(device), torch.tanh(x @ torch.randn(96, 48, generator=generator)).to(device)


def student(device="cpu", seed=0, width=128):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(96, width), nn.Tanh(), nn.Linear(width, 48)).to(device)


def spec(optim, **settings):
    return TrainingSpec(**{"optim": optim, "learning_rate": 1e-2, "weight_decay": 0.01, **settings})


def losses(model, optimizer, steps, device="cpu"):
    x, y = teacher(device)
    told = []
    for _ in range(steps):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        told.append(loss.item())
    return told


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", DEVICES)
def test_the_curve_is_that_of_32_bits(name, device):
    curves = {}
    for optim in ("adamw_torch_fused", name):
        model = student(device)
        curves[optim] = torch.tensor(losses(model, build_optimizer(model, None, spec(optim)), 60, device))
    exact, other = curves["adamw_torch_fused"], curves[name]
    assert exact[-1] < 0.05 * exact[0]  # it learns, so that the curves could differ
    if name == "paged_adamw_32bit":
        assert torch.allclose(exact, other, rtol=1e-4)
    else:
        assert torch.allclose(exact, other, rtol=0.1, atol=0.01 * exact[0].item())
        assert not torch.equal(exact, other)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("device", "width"),
    [("cpu", 128), *(pytest.param("cuda", width, marks=pytest.mark.gpu) for width in (128, 2048))],  # 2048 is paged
)
def test_the_next_steps_after_loading_are_bit_identical(tmp_path, name, device, width):
    training = spec(name)
    model = student(device, width=width)
    optimizer = build_optimizer(model, None, training)
    losses(model, optimizer, 3, device)
    checkpoint.save(tmp_path, 3, dict(model.named_parameters()), optimizer, keep=1)

    other = student(device, seed=1, width=width)
    built = build_optimizer(other, None, training)
    _, prepared = Accelerator(cpu=device == "cpu").prepare(other, built)  # as the loop does
    assert checkpoint.load(tmp_path / "step-00000003", dict(other.named_parameters()), built) == 3
    assert losses(model, optimizer, 3, device) == losses(other, prepared, 3, device)
    for (mine, one), (theirs, two) in zip(optimizer.state.items(), built.state.items(), strict=True):
        assert torch.equal(mine, theirs)
        assert one.keys() == two.keys()
        assert one["step"] == two["step"] == 6
        assert all(torch.equal(one[key], two[key]) for key in one if key != "step")
        paged = device == "cuda" and name.startswith("paged") and mine.numel() >= 100_000
        assert getattr(two["state1"], "is_paged", False) == paged


@pytest.mark.parametrize("name", ["adamw_torch_fused", *NAMES])
def test_the_bytes_of_its_averages_are_those_of_the_spec(name):
    model = student()
    optimizer = build_optimizer(model, None, spec(name))
    losses(model, optimizer, 1)
    held = sum(
        tensor.nbytes
        for state in optimizer.state.values()
        for key, tensor in state.items()
        if key in ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")
    )
    assert spec(name).optimizer_bytes([p.numel() for p in model.parameters()], "cpu") == held


def test_what_is_paged_is_not_counted_on_a_gpu():
    assert spec("paged_adamw_32bit").optimizer_bytes([100_000, 4096], "cuda") == 8 * 4096
    assert spec("paged_adamw_8bit").optimizer_bytes([100_000, 4096], "cuda") == 2 * (4096 + 4 * 16)
    assert spec("paged_adamw_8bit").optimizer_bytes([100_000], "cpu") == 2 * (100_000 + 4 * 391)
    assert spec("lorafa").optimizer_bytes([10], "cuda") == 80


def test_transformers_two_names_are_one():
    assert TrainingSpec(optim="adamw_bnb_8bit") == TrainingSpec(optim="adamw_8bit")


def test_lora_plus_may_have_8_bits():
    torch.manual_seed(0)
    adapted = get_peft_model(student(), LoraConfig(r=64, target_modules=["0", "2"], init_lora_weights=False))
    optimizer = build_optimizer(adapted, adapted, spec("adamw_8bit", loraplus_lr_ratio=16.0))
    rates = {group["lr_ratio"] for group in optimizer.param_groups if group["params"]}
    assert rates == {1.0, 16.0}
    curve = losses(adapted, optimizer, 40)
    assert curve[-1] < 0.5 * curve[0]
    kept = {state["state1"].dtype for state in optimizer.state.values()}
    assert kept == {torch.uint8, torch.float32}  # 48 x 64 values are too few for 8 bits


def test_a_checkpoint_of_another_optimiser_is_refused(tmp_path):
    model = student()
    optimizer = build_optimizer(model, None, spec("adamw_8bit"))
    losses(model, optimizer, 1)
    path = checkpoint.save(tmp_path, 1, dict(model.named_parameters()), optimizer, keep=1)
    other = build_optimizer(model, None, spec("paged_adamw_32bit"))
    with pytest.raises(RunError, match="another optimiser"):
        checkpoint.load(path, dict(model.named_parameters()), other)


def test_bitsandbytes_is_imported_only_when_asked_for():
    code = """
import sys, torch
from nbtune.spec import TrainingSpec
from nbtune.train.optim import build_optimizer
model = torch.nn.Linear(2, 2)
build_optimizer(model, None, TrainingSpec())
assert "bitsandbytes" not in sys.modules
build_optimizer(model, None, TrainingSpec(optim="adamw_8bit"))
assert "bitsandbytes" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
