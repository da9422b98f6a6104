"""Fresh copies of tiny models; real `peft` is the oracle of these tests."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tiny_models import MODELS
from torch import nn


@pytest.fixture(autouse=True)
def _quiet():
    """One seed for every test, and no word of transformers' renamed functions."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


@pytest.fixture(scope="session")
def originals() -> dict[str, nn.Module]:
    return {name: make() for name, make in MODELS.items()}


@pytest.fixture
def make(originals):
    """`make("llama")`: a fresh copy of the same random model."""
    return lambda name="llama": copy.deepcopy(originals[name])


@pytest.fixture
def base(make):
    return make("llama")


@pytest.fixture
def ids():
    return torch.randint(1, 96, (3, 11), generator=torch.Generator().manual_seed(0))
