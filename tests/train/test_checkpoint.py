"""Checkpoints give back every bit, and never half of one."""

import json

import pytest
import torch
from torch import nn

from nbtune.errors import RunError
from nbtune.spec import TrainingSpec
from nbtune.train import checkpoint
from nbtune.train.optim import adamw


def trained(seed=0, steps=3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
    parameters = dict(model.named_parameters())
    optimizer = adamw(parameters.items(), TrainingSpec(weight_decay=0.1))
    for _ in range(steps):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, parameters, optimizer


def step_once(model, optimizer):
    model(torch.linspace(-1, 1, 20).view(5, 4)).square().sum().backward()
    optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_the_next_step_after_loading_is_bit_identical(tmp_path):
    model, parameters, optimizer = trained()
    path = checkpoint.save(tmp_path, 3, parameters, optimizer, keep=2)
    other, others, other_optimizer = trained(seed=1, steps=0)
    assert checkpoint.load(path, others, other_optimizer) == 3
    for a, b in zip(step_once(model, optimizer), step_once(other, other_optimizer), strict=True):
        assert torch.equal(a, b)


def test_only_the_newest_are_kept_and_half_written_ones_are_not_seen(tmp_path):
    _, parameters, optimizer = trained()
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, parameters, optimizer, keep=2)
    (tmp_path / ".step-00000011.abc").mkdir()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000002", "step-00000010"]


def test_nothing_but_safetensors_and_json_is_written(tmp_path):
    _, parameters, optimizer = trained()
    path = checkpoint.save(tmp_path, 1, parameters, optimizer, keep=1)
    assert sorted(file.name for file in path.iterdir()) == [
        "optimizer.safetensors",
        "state.json",
        "weights.safetensors",
    ]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    _, parameters, optimizer = trained()
    path = checkpoint.save(tmp_path, 1, parameters, optimizer, keep=1)
    del parameters["1.weight"]
    with pytest.raises(RunError, match=r"differ in 1 parameters, the first of them 1\.weight"):
        checkpoint.load(path, parameters, optimizer)


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    _, parameters, optimizer = trained()
    path = checkpoint.save(tmp_path, 1, parameters, optimizer, keep=1)
    state = json.loads((path / "state.json").read_text()) | {"format": 99}
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(RunError, match="another version"):
        checkpoint.load(path, parameters, optimizer)
