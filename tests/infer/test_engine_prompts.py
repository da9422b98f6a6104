"""Columns whose adapter is a trained prompt: the tokens of PeftModel.generate, beside columns of every other kind."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from nbtune.errors import NbtuneError
from nbtune.infer.columns import line_up
from nbtune.infer.engine import BASE, Engine
from nbtune.infer.sampling import GREEDY, Sampling
from nbtune.models import load
from nbtune.peft import PeftModel, get_peft_model
from nbtune.peft.configs.lora import LoraConfig
from nbtune.peft.configs.prompts import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from nbtune.spec import ModelSpec

CONFIGS = {
    "prompt": PromptTuningConfig(num_virtual_tokens=6),
    "prefix": PrefixTuningConfig(num_virtual_tokens=4),
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "p.tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16),
    "other prompt": PromptTuningConfig(num_virtual_tokens=6),
}
QUESTION = [{"role": "user", "content": "What does `os.path.join` do in Python?"}]
WARM = Sampling(temperature=1.5, top_p=0.95, top_k=50, min_p=0.01, repetition_penalty=1.1)


@pytest.fixture(scope="module")
def spec(tiny_model: Path) -> ModelSpec:
    return ModelSpec(name=str(tiny_model), dtype="float32")


@pytest.fixture(scope="module")
def folders(spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters with random weights, large enough to change what the small random model says."""
    folder = tmp_path_factory.mktemp("prompts")
    model = load(spec).model
    for seed, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=2.0)
        adapted.save_pretrained(folder / name)
        adapted.unload()
    return {name: folder / name for name in CONFIGS}


@pytest.fixture(scope="module")
def engine(spec: ModelSpec, folders: dict[str, Path]) -> Engine:
    return Engine(spec, folders)


def answer(engine: Engine, columns, sampling=GREEDY, n=8, seed=0) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {column: [] for column in columns}
    for delta in engine.stream(dict.fromkeys(columns, QUESTION), sampling, max_new_tokens=n, seed=seed):
        if delta.token is not None:
            tokens[delta.column].append(delta.token)
    return tokens


def test_each_column_writes_what_generate_does(engine, spec, folders):
    loaded = load(spec)
    ids = torch.tensor([engine.prompt(BASE, QUESTION)])

    def generate(model) -> list[int]:
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
        return out[0, ids.shape[1] :].tolist()

    expected = {BASE: generate(loaded.model)}
    for name, folder in folders.items():
        adapted = PeftModel.from_pretrained(loaded.model, folder)
        expected[name] = generate(adapted)
        adapted.unload()
    assert len({tuple(tokens) for tokens in expected.values()}) == len(expected)
    assert answer(engine, engine.columns, n=16) == expected


def test_a_prompt_answers_the_same_in_any_company(engine):
    together = answer(engine, engine.columns, WARM, seed=7)
    for column in engine.columns:
        assert answer(engine, [column], WARM, seed=7) == {column: together[column]}
    assert answer(engine, tuple(reversed(engine.columns)), WARM, seed=7) == together
    assert answer(engine, ["prompt"], WARM, seed=8)["prompt"] != together["prompt"]


def test_a_stop_reaches_every_column(engine):
    stop, seen = threading.Event(), []
    for delta in engine.stream(dict.fromkeys(engine.columns, QUESTION), GREEDY, should_stop=stop.is_set):
        seen.append(delta)
        if len(seen) == 7:
            stop.set()
    assert [delta.finished for delta in seen[7:]] == ["stopped"] * len(engine.columns)


def test_the_prompt_takes_its_share_of_the_context(engine, monkeypatch):
    length = len(engine.prompt(BASE, QUESTION))
    monkeypatch.setattr(engine.base_of(BASE), "context_length", length + 8)
    deltas = list(engine.stream(dict.fromkeys([BASE, "prompt", "prefix"], QUESTION), GREEDY))
    assert {delta.column: delta.stats.tokens for delta in deltas if delta.finished == "context"} == {
        BASE: 8,
        "prompt": 2,
        "prefix": 4,
    }
    monkeypatch.setattr(engine.base_of(BASE), "context_length", length + 5)
    assert engine.prompt("prefix", QUESTION)
    with pytest.raises(NbtuneError, match="longer than the model's context"):
        engine.stream({"prompt": QUESTION})


def test_a_prompt_is_named_by_its_length(folders):
    assert line_up(["base", folders["prompt"], folders["prefix"]]).labels == {
        BASE: "as it was",
        "prompt": "Prompt tuning, 6 tokens",
        "prefix": "Prefix tuning, 4 tokens",
    }
