"""Fresh copies of tiny models; real `peft` is the oracle of these tests."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

pytest.register_assert_rewrite("grid")

from tiny_models import MODELS  # noqa: E402
from torch import nn  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet():
    """One thread, one seed for every test, and no word of transformers' renamed functions."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads only get in each other's way on models as small as these
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
    torch.set_num_threads(threads)


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


def pytest_generate_tests(metafunc):
    """Each test of a `grid.MethodTests` runs on every case of its class, or on the first with each model."""
    if "case" in metafunc.fixturenames:
        cases = [(f"{case[0]}-{number}", case) for number, case in enumerate(metafunc.cls.cases)]
        if metafunc.definition.get_closest_marker("once_per_model") and not metafunc.cls.thorough:
            cases = list({case[0]: (name, case) for name, case in reversed(cases)}.values())[::-1]
        metafunc.parametrize("case", [case for _, case in cases], ids=[name for name, _ in cases])
