"""Fixtures: one engine over the real 135M model in fp32, with two adapters whose every weight is random."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nbtune.infer.engine import Engine
from nbtune.models import load, load_tokenizer
from nbtune.peft import LoraConfig, get_peft_model
from nbtune.spec import ModelSpec, RunSpec

SPEC = ModelSpec(name="smollm2-135m-instruct", dtype="float32")
CONFIGS = {
    "amber-heron": LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"]),
    "quiet.otter": LoraConfig(r=8, lora_alpha=8, target_modules=["o_proj", "down_proj"]),
}


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters that change the answers of the model and leave it able to write."""
    folder = tmp_path_factory.mktemp("adapters")
    loaded = load(SPEC)
    for seed, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        model = get_peft_model(loaded.model, config)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder / name)
        model.unload()
    return {name: folder / name for name in CONFIGS}


@pytest.fixture(scope="session")
def engine(adapters: dict[str, Path]) -> Engine:
    return Engine(SPEC, adapters)


@pytest.fixture(scope="session")
def runs_dir(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, as training leaves them."""
    runs = tmp_path_factory.mktemp("runs")
    for name, folder in adapters.items():
        run = runs / name
        run.mkdir()
        (run / "spec.yaml").write_text(RunSpec(model=SPEC, method=CONFIGS[name]).to_yaml())
        (run / "adapter").symlink_to(folder)
    return runs


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another base: the real tokenizer on two small random layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = load_tokenizer(SPEC)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
