"""Combinations of adapters as columns: what they answer, which are refused, and what is written of them."""

from __future__ import annotations

import threading
from pathlib import Path

import peft
import pytest
import torch

import nbtune.peft
from nbtune.errors import NbtuneError
from nbtune.infer import base as base_module
from nbtune.infer.engine import BASE, Engine
from nbtune.infer.mix import COMBINATIONS, NEED_DENSITY, Mix
from nbtune.infer.sampling import GREEDY
from nbtune.models import load
from nbtune.peft import get_peft_model
from nbtune.spec import ModelSpec

QUESTION = [{"role": "user", "content": "What does `os.path.join` do in Python?"}]
CONFIGS = {
    "first": ("LoraConfig", {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    "second one": ("LoraConfig", {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}),
    "wide": ("LoraConfig", {"r": 8, "target_modules": ["q_proj", "v_proj"]}),
    "ia3": ("IA3Config", {}),
    "other ia3": ("IA3Config", {}),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True, "target_modules": ["q_proj"]}),
    "oft": ("OFTConfig", {"oft_block_size": 8}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 4}),
}
BOTH = {"first": 0.7, "second one": -0.3}


@pytest.fixture(scope="module")
def spec(tiny_model: Path) -> ModelSpec:
    return ModelSpec(name=str(tiny_model), dtype="float32")


@pytest.fixture(scope="module")
def folders(spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mixed")
    model = load(spec).model
    for seed, (name, (config, settings)) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, getattr(nbtune.peft, config)(**settings))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        adapted.save_pretrained(folder / name)
        adapted.unload()
    return {name: folder / name for name in CONFIGS}


@pytest.fixture(scope="module")
def engine(spec: ModelSpec, folders: dict[str, Path]) -> Engine:
    return Engine(spec, folders)


def mixed(kind: str, weights=BOTH, **more) -> Mix:
    return Mix(weights, kind, density=0.5 if kind in NEED_DENSITY else None, **more)


def logits(engine: Engine, column: str) -> torch.Tensor:
    """Of the question's next token, [V]."""
    (batch,) = engine.batches([engine.answer(column, QUESTION, GREEDY, max_new_tokens=1, seed=0)])
    return engine._forward([column], input_ids=batch._unread, past_key_values=batch._cache)[0]


def tokens(engine: Engine, columns, n=6) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {column: [] for column in columns}
    for delta in engine.stream(dict.fromkeys(columns, QUESTION), GREEDY, max_new_tokens=n):
        found[delta.column].append(delta.token)
    return found


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_what_is_saved_answers_with_peft_as_the_column_does(engine, spec, kind, tmp_path):
    from transformers import AutoModelForCausalLM

    mix = mixed(kind)
    column = engine.mix(mix)
    assert column == f'0.7 first - 0.3 "second one", {kind}' + (", density 0.5" if kind in NEED_DENSITY else "")
    engine.save_mix(mix, tmp_path / "both")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both"]
    files = sorted(path.name for path in (tmp_path / "both").iterdir())
    assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    model = AutoModelForCausalLM.from_pretrained(spec.name, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "both"))
    with torch.no_grad():
        expected = adapted(torch.tensor([engine.prompt(BASE, QUESTION)])).logits[0, -1]
    found = logits(engine, column)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - logits(engine, BASE)).abs().max() > 0.01  # or it does nothing


def test_cat_is_the_weighted_sum_of_the_updates(engine, spec, folders):
    column = engine.mix(mixed("cat"))
    model = load(spec).model
    names = {"q": "model.layers.0.self_attn.q_proj", "down": "model.layers.1.mlp.down_proj"}
    expected = {key: torch.zeros_like(model.get_submodule(path).weight) for key, path in names.items()}
    for name, weight in BOTH.items():
        adapted = nbtune.peft.PeftModel.from_pretrained(model, folders[name])
        for key, path in names.items():
            layer = model.get_submodule(path)
            if isinstance(layer, nbtune.peft.layer.AdapterLayer):
                expected[key] += weight * layer.adapters["default"].delta_weight(layer.base_layer)
        adapted.unload()
    inner = engine.base_of(column)
    for key, path in names.items():
        layer = inner._model.get_base_model().get_submodule(path)
        found = layer.adapters[inner._mixed[column]].delta_weight(layer.base_layer)
        torch.testing.assert_close(found, expected[key], atol=1e-5, rtol=1e-5)


def test_the_card_says_what_it_is_made_of(engine, folders, tmp_path):
    engine.save_mix(mixed("ties", majority_sign_method="frequency"), tmp_path / "both")
    card = (tmp_path / "both" / "README.md").read_text(encoding="utf-8")
    assert "combination type `ties`, density 0.5, majority_sign_method frequency" in card
    assert f"base_model: {str(engine.spec.name)!r}".replace("'", '"') in card
    for name, weight in BOTH.items():
        row = next(line for line in card.splitlines() if line.startswith(f"| {name} "))
        assert f" {weight} " in row
        assert folders[name].name in row
    with pytest.raises(NbtuneError, match=r"both exists[\s\S]*new folder"):
        engine.save_mix(mixed("cat"), tmp_path / "both")
    assert (tmp_path / "both" / "README.md").read_text(encoding="utf-8") == card


def test_ia3_is_combined_linearly_alone(engine):
    weights = {"ia3": 0.5, "other ia3": 0.5}
    assert tokens(engine, [engine.mix(Mix(weights))])
    with pytest.raises(NbtuneError, match="linear"):
        engine.mix(Mix(weights, "cat"))


def test_mixes_share_a_batch_with_columns_and_are_not_listed(engine):
    columns = (*engine.columns[:3], engine.mix(mixed("linear")), engine.mix(mixed("cat")))
    alone = {column: tokens(engine, [column])[column] for column in columns}
    assert engine.shares(columns[-1]) == engine.shares(BASE)
    assert tokens(engine, columns) == alone
    assert len({tuple(found) for found in alone.values()}) > 2
    assert engine.columns == (BASE, *CONFIGS)


def test_few_are_kept_and_one_that_has_gone_comes_back(engine):
    first = engine.mix(mixed("dare_linear"))
    before = logits(engine, first)
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    made = [engine.mix(Mix({"first": weight / 7, "wide": 1.0}, "cat")) for weight in range(6)]
    base = engine.base_of(BASE)
    assert list(base._mixed) == made[-base_module.MIXES :]
    torch.testing.assert_close(logits(engine, first), before, atol=0, rtol=0)  # and the same entries were kept
    assert torch.equal(torch.rand(3), drawn)  # nobody else's random numbers were taken
    assert len(base._mixed) == base_module.MIXES
    every = [first, *made]
    alone = {column: tokens(engine, [column])[column] for column in every}
    assert tokens(engine, every) == alone  # more in one batch than are kept


def test_a_mix_is_made_once_whoever_asks(engine):
    mix = Mix({"first": 0.25, "wide": 0.75}, "svd")
    counts = engine.base_of(BASE)._made
    threads = [threading.Thread(target=engine.mix, args=(mix,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine.base_of(BASE)._made == counts + 1


def test_a_mix_waits_for_a_stream(engine):
    stream = engine.stream({"first": QUESTION}, GREEDY, max_new_tokens=4)
    next(stream)
    done = threading.Event()
    thread = threading.Thread(target=lambda: (engine.mix(Mix({"first": 0.123})), done.set()))
    thread.start()
    assert not done.wait(0.3)
    stream.close()
    assert done.wait(60)
    thread.join()


@pytest.mark.parametrize(
    ("weights", "kind", "more", "said"),
    [
        ({}, "linear", {}, "nothing to combine"),
        ({"first": float("nan")}, "linear", {}, r"first: nan[\s\S]*Give a number"),
        (BOTH, "lineal", {}, r"'lineal'[\s\S]*magnitude_prune"),
        (BOTH, "ties", {}, r"needs a density[\s\S]*such as 0\.5"),
        (BOTH, "dare_ties_svd", {"density": 1.5}, "needs a density"),
        (BOTH, "ties", {"density": 0.5, "majority_sign_method": "loud"}, r"'loud'[\s\S]*total or frequency"),
        (BOTH, "svd", {"svd_rank": 0}, r"svd_rank is 0"),
        (BOTH, "svd", {"svd_clamp": 2.0}, "quantile"),
        ({"first": 1.0, "firts": 1.0}, "linear", {}, r"no column 'firts'[\s\S]*second one"),
        ({"first": 1.0, BASE: 1.0}, "linear", {}, "base is a whole model"),
        ({"first": 1.0, "prompt": 1.0}, "linear", {}, "prompt is a trained prompt"),
        ({"first": 1.0, "wide": 1.0}, "linear", {}, r"one rank[\s\S]*svd or cat"),
        ({"first": 1.0, "ia3": 1.0}, "linear", {}, r"IA3, LORA[\s\S]*one method"),
        ({"dora": 1.0, "first": 1.0}, "cat", {}, r"DoRA[\s\S]*plain LoRA"),
        ({"oft": 1.0}, "linear", {}, "OFT has no weighted combinations"),
    ],
)
def test_what_cannot_be_combined_is_refused(engine, weights, kind, more, said):
    before = dict(engine.base_of(BASE)._mixed)
    with pytest.raises(NbtuneError, match=said):
        engine.mix(Mix(weights, kind, **more))
    assert engine.base_of(BASE)._mixed == before
    assert tokens(engine, ["first"], n=1)  # the engine lives


def test_a_mix_nobody_made_is_an_unknown_column(engine):
    with pytest.raises(NbtuneError, match="no column"):
        engine.stream({Mix({"first": 0.987}).name: QUESTION})
