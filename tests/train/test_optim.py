"""The schedule against transformers'; the optimiser's groups."""

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from nbtune.spec import TrainingSpec
from nbtune.train.optim import adamw, learning_rate


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("total", [1, 7, 60])
def test_learning_rate_is_that_of_transformers(name, total):
    training = TrainingSpec(lr_scheduler_type=name, warmup_ratio=0.1, learning_rate=0.01)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=-(-total // 10), num_training_steps=total)
    for step in range(total):
        assert learning_rate(step, total, training) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        scheduler.step()


def test_only_matrices_decay():
    parameters = {"weight": nn.Parameter(torch.zeros(2, 2)), "bias": nn.Parameter(torch.zeros(2))}
    optimizer = adamw(parameters.items(), TrainingSpec(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {id(parameters["weight"]): 0.1, id(parameters["bias"]): 0.0}
