"""The packaged 135M model with an adapter as an f16 GGUF: the same greedy tokens as nbtune's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_families import adapter
from transformers.integrations.gguf import read_gguf_metadata

import nbtune as nt
from nbtune.peft import LoraConfig
from nbtune.spec import ModelSpec


@pytest.mark.slow
def test_f16_says_the_same(tmp_path: Path) -> None:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "down_proj"])
    folder = adapter(ModelSpec(dtype="float32"), config, tmp_path / "adapter", 0.02)
    done = nt.export(folder, "gguf", tmp_path / "model.gguf")
    assert done.proof.greedy_agree == done.proof.greedy_tokens == 48
    assert done.proof.relative_difference < 0.005
    assert done.same_tokens is True
    assert json.loads(done.report.read_text())["proof"]["greedy_agree"] == 48
    values, _ = read_gguf_metadata(str(done.path))
    assert values["tokenizer.ggml.pre"] == "smollm"  # as in the base's own GGUF
    assert values["tokenizer.ggml.tokens"] == 49152
