"""Adapters of tiny models of every family, whose every weight is random."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_families
import torch

from nbtune.peft import LoraConfig
from nbtune.spec import ModelSpec

TARGETS = {"phi3": ["qkv_proj", "gate_up_proj"]}


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny model."""
    root = tmp_path_factory.mktemp("bases")
    return functools.cache(lambda family: tiny_families.write(family, root / family))


@pytest.fixture(scope="session")
def adapters(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a LoRA adapter of a family's tiny model."""
    root = tmp_path_factory.mktemp("adapters")

    @functools.cache
    def made(family: str) -> Path:
        targets = TARGETS.get(family, ["q_proj", "k_proj", "v_proj", "down_proj"])
        config = LoraConfig(r=4, lora_alpha=16, target_modules=targets)
        return tiny_families.adapter(ModelSpec(name=str(bases(family)), dtype="float32"), config, root / family)

    return made
