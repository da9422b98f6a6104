"""Columns of several base models: loaded in turn within a budget, each as if it were alone."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch

from nbtune.chat_templates import chat_template
from nbtune.errors import ModelError, NbtuneError
from nbtune.infer.columns import BASE, line_up
from nbtune.infer.engine import Engine
from nbtune.infer.mix import Mix
from nbtune.infer.sampling import GREEDY
from nbtune.infer.server import Server
from nbtune.models import load
from nbtune.peft import LoraConfig, get_peft_model
from nbtune.spec import ModelSpec, RunSpec

QUESTION = [{"role": "user", "content": "What does `os.path.join` do in Python?"}]


@pytest.fixture(scope="module")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like the tiny model, but with weights, a template, a context and sampling settings of its own."""
    folder = tmp_path_factory.mktemp("other") / "other"
    shutil.copytree(tiny_model, folder)
    loaded = load(ModelSpec(name=str(folder), dtype="float32"))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    loaded.model.config.max_position_embeddings = 256
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.chat_template = chat_template("zephyr")
    loaded.tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.75}))
    return folder


@pytest.fixture(scope="module")
def runs(tiny_model: Path, other_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on both: two adapters of the first, one of the second, a full fine-tune of the second."""
    folder = tmp_path_factory.mktemp("runs")
    made = {"one": tiny_model, "two": tiny_model, "three": other_model}
    for seed, (name, base) in enumerate(made.items()):
        spec = ModelSpec(name=str(base), dtype="float32")
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
        torch.manual_seed(seed)
        model = get_peft_model(load(spec).model, config)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / name / "adapter")
        (folder / name / "spec.yaml").write_text(RunSpec(model=spec, method=config).to_yaml())
    spec = ModelSpec(name=str(other_model), dtype="float32")
    loaded = load(spec)
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(-1)
    loaded.model.save_pretrained(folder / "whole" / "model")
    loaded.tokenizer.save_pretrained(folder / "whole" / "model")
    (folder / "whole" / "spec.yaml").write_text(RunSpec(model=spec, method="full").to_yaml())
    return folder


def lined_up(runs: Path, *names: str):
    return line_up(names or ("one", "two", "three", "whole"), runs)


def tokens(engine: Engine, columns, n=6) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {column: [] for column in columns}
    for delta in engine.stream(dict.fromkeys(columns, QUESTION), GREEDY, max_new_tokens=n):
        found[delta.column].append(delta.token)
    return found


class Watch:
    """What an engine says it loads, and how many models are in memory when it begins to."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.models: list[weakref.ref] = []
        self.alive: list[int] = []
        self.engine: Engine | None = None

    def __call__(self, message: str) -> None:
        if not message.startswith("Loading"):
            return
        self.said.append(message)
        self.alive.append(sum(model() is not None for model in self.models))

    def look(self) -> None:
        for base in self.engine.memory.held:
            if all(model() is not base._model for model in self.models):
                self.models.append(weakref.ref(base._model))


def watched(lineup, budget: int | None) -> tuple[Engine, Watch]:
    watch = Watch()
    watch.engine = Engine.of(lineup, memory_budget=budget, on_status=watch)
    watch.look()
    return watch.engine, watch


@pytest.fixture(scope="module")
def alone(runs: Path, other_model: Path) -> dict[str, list[int]]:
    """What each column answers in an engine of its own base."""
    first, second = Engine.of(lined_up(runs, "one", "two")), Engine.of(lined_up(runs, "three"))
    whole = Engine(ModelSpec(name=str(runs / "whole" / "model"), dtype="float32"))
    second_tokens = tokens(second, second.columns)
    return {
        **tokens(first, first.columns),
        f"base ({other_model.name})": second_tokens[BASE],
        "three": second_tokens["three"],
        "whole": tokens(whole, [BASE])[BASE],
    }


@pytest.fixture(scope="module")
def roomy(runs: Path) -> Engine:
    """All in memory at once."""
    return Engine.of(lined_up(runs))


def test_in_turn_each_answers_as_it_does_alone(runs, roomy, alone):
    engine, watch = watched(lined_up(runs), budget=roomy.base_of(BASE).bytes + 100)
    assert engine.columns == (BASE, "one", "two", "base (other)", "three", "whole")
    found: dict[str, list[int]] = {column: [] for column in engine.columns}
    order: list[str] = []
    for delta in engine.stream(dict.fromkeys(engine.columns, QUESTION), GREEDY, max_new_tokens=6):
        watch.look()
        order.append(delta.column)
        found[delta.column].append(delta.token)
    assert found == alone
    assert len({tuple(answer) for answer in alone.values()}) == len(alone)
    assert watch.said == [f"Loading {name}" for name in (Path(engine.spec.name).name, "other", "model")]
    assert watch.alive == [0, 0, 0]  # each was dropped before the next one came
    assert set(order[:18]) == {BASE, "one", "two"}  # a base's columns are written together, one base after the other
    assert order[18:30] == ["base (other)", "three"] * 6
    assert [base.source.name for base in engine.memory.held] == ["model"]


def test_what_fits_is_written_together_and_stays(runs, alone):
    engine, watch = watched(lined_up(runs), budget=None)
    order = [delta.column for delta in engine.stream(dict.fromkeys(engine.columns, QUESTION), GREEDY, max_new_tokens=2)]
    assert order == [*engine.columns, *engine.columns]
    assert tokens(engine, engine.columns) == alone
    assert len(watch.said) == 3
    assert len(engine.memory.held) == 3


def test_the_one_least_recently_asked_goes(runs, roomy):
    engine, watch = watched(lined_up(runs), budget=2 * roomy.base_of(BASE).bytes)
    for column in ("three", "one", "whole", "one", "three"):
        tokens(engine, [column], n=1)
        watch.look()
        assert len(engine.memory.held) <= 2
    first, last = Path(engine.spec.name).name, "other"
    assert watch.said == [f"Loading {name}" for name in (first, "other", "model", last)]
    assert watch.alive == [0, 1, 1, 1]


def test_columns_of_one_base_are_one_forward_pass(roomy, monkeypatch):
    engine = roomy
    passes: list[list[str]] = []
    forward = engine._forward
    monkeypatch.setattr(engine, "_forward", lambda columns, **i: (passes.append(columns), forward(columns, **i))[1])
    tokens(engine, engine.columns, n=2)
    assert passes == [[BASE, "one", "two"], ["base (other)", "three"], ["whole"]] * 2


def test_each_base_has_its_own_tokenizer_defaults_context_and_stops(roomy):
    engine = roomy
    first, other = engine.base_of("one"), engine.base_of("three")
    assert other.chat_template == chat_template("zephyr") != first.chat_template
    assert engine.prompt("three", QUESTION) != engine.prompt("one", QUESTION)
    assert (first.context_length, other.context_length) == (512, 256)
    assert other.defaults.text == "temperature 0.75 from generation_config"
    assert engine.defaults.text != other.defaults.text
    long = [{"role": "user", "content": "word " * 300}]
    assert engine.prompt("one", long)
    with pytest.raises(NbtuneError, match=r"three: 3\d\d tokens; .*other reads 256"):
        engine.prompt("three", long)


def test_a_stop_reaches_those_whose_model_is_not_loaded(runs, roomy):
    engine, watch = watched(lined_up(runs), budget=roomy.base_of(BASE).bytes + 100)
    seen = []
    for delta in engine.stream(dict.fromkeys(engine.columns, QUESTION), GREEDY, should_stop=lambda: len(seen) == 2):
        seen.append(delta)
    assert sorted(delta.column for delta in seen[2:]) == sorted(engine.columns)
    assert {delta.finished for delta in seen[2:]} == {"stopped"}
    assert len(watch.said) == 1


def test_a_mix_comes_back_with_its_base(runs, roomy):
    mix = roomy.mix(Mix({"one": 0.5, "two": 0.5}))
    before = tokens(roomy, [mix])
    small, watch = watched(lined_up(runs), budget=roomy.base_of("one").bytes + 100)
    assert small.mix(Mix({"one": 0.5, "two": 0.5})) == mix
    tokens(small, ["whole"])
    assert tokens(small, [mix]) == before
    assert len(watch.said) == 3
    with pytest.raises(NbtuneError, match=r"different base models[\s\S]*Combine those of one base"):
        small.mix(Mix({"one": 0.5, "three": 0.5}))


def test_a_base_that_does_not_fit_alone_is_refused_before_loading(runs):
    watch = Watch()
    with pytest.raises(ModelError, match=r"does not fit[\s\S]*weights take \d\.\d\d GB in float32[\s\S]*memory_budget"):
        Engine.of(lined_up(runs), memory_budget=1000, on_status=watch)
    assert watch.said == []


def test_a_server_holds_all_or_refuses(runs, roomy):
    engine, _ = watched(lined_up(runs), budget=roomy.base_of(BASE).bytes + 100)
    with pytest.raises(NbtuneError, match=r"do not fit into memory together[\s\S]*other: 0\.0\d GB"):
        Server(engine, "127.0.0.1", 0, None)
    whole, _ = watched(lined_up(runs), budget=None)
    with Server(whole, "127.0.0.1", 0, None):
        assert len(whole.memory.held) == 3


def test_a_closed_engine_loads_nothing(runs):
    engine, watch = watched(lined_up(runs, "one"), budget=None)
    engine.close()
    with pytest.raises(NbtuneError, match="engine is closed"):
        tokens(engine, ["one"])
    assert [model() for model in watch.models] == [None]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_weights_in_bf16_are_packed_where_there_is_memory_for_them_twice(tiny_model: Path) -> None:
    spec = ModelSpec(name=str(tiny_model), dtype="bfloat16")
    roomy = Engine(spec, device="cpu", memory_budget=10**9)
    once = roomy.base_of(BASE).bytes // 2
    tight = Engine(spec, device="cpu", memory_budget=2 * once - 1)
    assert [engine.base_of(BASE).packs for engine in (roomy, tight)] == [True, False]
    assert tight.base_of(BASE).bytes == once

    def layers(engine: Engine) -> set[str]:
        model = engine.base_of(BASE)._model
        return {type(layer).__name__ for layer in model.modules() if isinstance(layer, torch.nn.Linear)}

    assert [layers(engine) for engine in (roomy, tight)] == [{"PackedLinear"}, {"Linear"}]
    ids = torch.tensor([[5, 6, 7]])
    logits = [engine.base_of(BASE).logits([BASE], 3, input_ids=ids) for engine in (roomy, tight)]
    torch.testing.assert_close(*logits, rtol=0.02, atol=0.02)
