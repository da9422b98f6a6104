"""Adapters of many methods as columns: each writes what its PeftModel alone generates, and rows of one batch agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import nbtune.peft
from nbtune.infer.columns import line_up
from nbtune.infer.engine import BASE, Engine
from nbtune.infer.sampling import GREEDY
from nbtune.models import load
from nbtune.peft import PeftModel, get_peft_model
from nbtune.spec import ModelSpec

# A method of each family, and those that change what is no linear layer. The tiny model is 32 wide.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "oft": ("OFTConfig", {"oft_block_size": 8}),
    "ia3": ("IA3Config", {}),
    "vera": ("VeraConfig", {"r": 8, "target_modules": ["q_proj", "down_proj"]}),
    "lokr": ("LoKrConfig", {"r": 4}),
    "c3a": ("C3AConfig", {"block_size": 16, "target_modules": ["q_proj", "down_proj"]}),
    "norms": ("LNTuningConfig", {}),
    "tokens": ("TrainableTokensConfig", {"token_indices": list(range(0, 40_000, 2))}),
    "lora": ("LoraConfig", {"r": 4, "target_modules": "all-linear"}),
}
LABELS = ["OFT", "IA3", "VeRA r8", "LoKr r4", "C3A", "LN tuning", "Trainable tokens", "LoRA r4"]
QUESTION = [{"role": "user", "content": "What does `os.path.join` do in Python?"}]


@pytest.fixture(scope="module")
def spec(tiny_model: Path) -> ModelSpec:
    return ModelSpec(name=str(tiny_model), dtype="float32")


@pytest.fixture(scope="module")
def folders(spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters with random weights, large enough to change what the small random model says."""
    folder = tmp_path_factory.mktemp("methods")
    model = load(spec).model
    for seed, (name, (config, settings)) in enumerate(METHODS.items()):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, getattr(nbtune.peft, config)(**settings))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.5 * torch.randn_like(parameter))
        adapted.save_pretrained(folder / name)
        adapted.unload()
    return {name: folder / name for name in METHODS}


def test_each_column_writes_what_its_model_alone_generates(spec, folders):
    engine = Engine(spec, folders)
    assert engine.columns == (BASE, *METHODS)
    found: dict[str, list[int]] = {column: [] for column in engine.columns}
    for delta in engine.stream(dict.fromkeys(engine.columns, QUESTION), GREEDY, max_new_tokens=12):
        if delta.token is not None:
            found[delta.column].append(delta.token)
    model = load(spec).model
    ids = torch.tensor([engine.prompt(BASE, QUESTION)])
    expected = {}
    for column in engine.columns:
        adapted = model if column == BASE else PeftModel.from_pretrained(model, folders[column])
        out = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        expected[column] = out[0, ids.shape[1] :].tolist()
        if column != BASE:
            adapted.unload()
    assert found == expected
    assert len({tuple(tokens) for tokens in found.values()}) == len(found)  # each says something else


def test_conversations_of_any_length_share_a_batch(spec, folders):
    """Rows that are padded, and that end while others go on, write what they write alone."""
    engine = Engine(spec, folders)
    words = "one two three four five six seven eight nine".split()
    messages = {
        column: [{"role": "user", "content": " ".join(words[: number + 1])}]
        for number, column in enumerate(engine.columns)
    }
    forwards = []
    forward = engine._forward

    def counted(columns, **inputs):
        forwards.append(list(columns))
        return forward(columns, **inputs)

    engine._forward = counted
    # A token that some rows write early ends them; each column then ends at a step of its own.
    alone = {column: tokens_of(engine, {column: messages[column]}, 12)[column] for column in engine.columns}
    stop = alone["lora"][4]
    engine.base_of(BASE).stop_tokens = frozenset({stop})
    alone = {column: tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for column, tokens in alone.items()}
    assert len({len(tokens) for tokens in alone.values()}) > 1
    forwards.clear()
    assert tokens_of(engine, messages, 12) == alone
    assert len(forwards) == 12
    assert len(forwards[0]) == len(engine.columns) > len(forwards[-1])


def test_a_batch_that_others_keep_joining_does_not_grow(spec, folders):
    """Rows come and go; each writes what it writes alone, in a cache no longer than the longest row needs."""
    engine = Engine(spec, folders)
    asks = dict(zip(METHODS, [9, 1, 30, 4, 2, 12, 3, 8], strict=True))  # words of the question to each column

    def question(column):
        return [{"role": "user", "content": "word " * asks[column]}]

    def begun(column):
        (batch,) = engine.batches([engine.answer(column, question(column), GREEDY, max_new_tokens=6, seed=0)])
        found[column] = [delta.token for delta in batch.turn()]
        return batch

    found: dict[str, list[int]] = {}
    waiting = list(asks)
    batch = begun(waiting.pop(0))
    while batch.answers:
        for delta in batch.turn():
            found[delta.column].append(delta.token)
        if waiting:
            batch.join(begun(waiting.pop(0)))
        if batch.answers:
            longest = max(answer.ids.shape[1] for answer in batch.answers)
            assert batch._mask.shape[1] == longest
            assert batch._layers[0].keys.shape[2] == longest - 1
    assert found == {column: tokens_of(engine, {column: question(column)}, 6)[column] for column in asks}


def tokens_of(engine, messages, count):
    found: dict[str, list[int]] = {column: [] for column in messages}
    for delta in engine.stream(messages, GREEDY, max_new_tokens=count):
        if delta.token is not None:
            found[delta.column].append(delta.token)
    return found


def test_rows_of_one_batch_have_any_method(spec, folders):
    model = load(spec).model
    adapted = PeftModel.from_pretrained(model, folders["lora"], adapter_name="lora")
    for name, folder in folders.items():
        if name != "lora":
            adapted.load_adapter(folder, adapter_name=name)
    ids = torch.randint(0, 1000, (1, 11), generator=torch.Generator().manual_seed(0))
    names = ["__base__", *METHODS]
    with torch.no_grad():
        together = adapted(input_ids=ids.repeat(len(names), 1), adapter_names=names).logits
        for row, name in zip(together, names, strict=True):
            adapted.set_adapter([] if name == "__base__" else [name])
            torch.testing.assert_close(row, adapted(input_ids=ids).logits[0], atol=2e-5, rtol=1e-5, msg=name)


def test_a_column_is_labelled_by_its_method(folders):
    assert line_up([BASE, *folders.values()]).labels == {
        BASE: "as it was",
        **dict(zip(METHODS, LABELS, strict=True)),
    }
