"""Adapters of tiny models of every family, whose every weight is random."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_families
import torch

from nbtune.models import load
from nbtune.peft import LoraConfig, PeftConfig, get_peft_model
from nbtune.spec import ModelSpec

TARGETS = {"phi3": ["qkv_proj", "gate_up_proj"]}


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def adapter(model: ModelSpec, config: PeftConfig, folder: Path, size: float = 0.1) -> Path:
    """An adapter of `model` that changes what it says, by random numbers of this `size`."""
    torch.manual_seed(1)
    adapted = get_peft_model(load(model, device="cpu").model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return folder


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
        return adapter(ModelSpec(name=str(bases(family)), dtype="float32"), config, root / family)

    return made
