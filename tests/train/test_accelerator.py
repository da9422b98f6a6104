"""A run does what its spec says, whatever another trainer has left in accelerate's settings of the process."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

from nbtune.train.accelerator import own_accelerator


@pytest.fixture(autouse=True)
def fresh_state():
    """What accelerate keeps in the process, as if nothing had used it; afterwards too."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def step() -> tuple[torch.Tensor, torch.dtype]:
    """The weight after one step down its own sum, and the precision of the forward pass."""
    layer = nn.Linear(4, 4, bias=False)
    nn.init.ones_(layer.weight)
    accelerator = own_accelerator()
    model, optimizer = accelerator.prepare(nn.Sequential(layer), torch.optim.SGD(layer.parameters(), lr=0.5))
    seen = []
    layer.register_forward_hook(lambda _layer, _args, output: seen.append(output.dtype))
    accelerator.backward(model(torch.ones(1, 4)).sum())
    optimizer.step()
    return layer.weight.detach(), seen[0]


HALVED = torch.full((4, 4), 0.5)


def test_the_precision_of_another_trainer_is_not_taken_over():
    Accelerator(mixed_precision="bf16")
    weight, dtype = step()
    torch.testing.assert_close(weight, HALVED)
    assert dtype is torch.float32


def test_another_trainer_that_stopped_in_mid_accumulation_does_not_keep_ours_from_stepping():
    Accelerator(gradient_accumulation_steps=4).gradient_state._set_sync_gradients(False)
    torch.testing.assert_close(step()[0], HALVED)


def test_settings_of_the_environment_are_not_taken_over(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    weight, dtype = step()
    torch.testing.assert_close(weight, HALVED)
    assert dtype is torch.float32
