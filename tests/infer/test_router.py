from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
import torch

import nbtune as nt
from nbtune.errors import NbtuneError
from nbtune.infer.engine import Engine
from nbtune.infer.router import ByPattern, ByRule, BySimilarity, Decision
from nbtune.infer.similarity import MAX_ROWS, Embedder, Index, Nearest
from nbtune.models import load
from nbtune.peft import LoraConfig, get_peft_model
from nbtune.spec import DataSpec, ModelSpec, RunSpec

DISHES = ("a lentil soup", "pancakes", "an apple pie", "roast chicken", "fish stew")
KITCHEN = ("How long do I cook {}?", "Which spices go into {}?", "How do I keep {} warm?", "Give me a recipe for {}.")
THINGS = ("a list", "a dictionary", "a file path", "a string", "a thread lock")
CODE = (
    "How do I sort {} in Python?",
    "What does len() return for {}?",
    "Write a loop over {}.",
    "How do I copy {} in code?",
)
COOK = [question.format(dish) for dish, question in itertools.product(DISHES, KITCHEN)]
PROGRAM = [question.format(thing) for thing, question in itertools.product(THINGS, CODE)]
HELD_OUT = 4  # of each: the last thing's questions


def make_run(runs: Path, name: str, model: ModelSpec, prompts: list[str]) -> Path:
    """A run's folder as far as a router looks at it."""
    (runs / name / "adapter").mkdir(parents=True)
    (runs / name / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "base_model_name_or_path": model.name})
    )
    rows = runs / name / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text, "completion": "x"}) + "\n" for text in prompts))
    spec = RunSpec(model=model, data=DataSpec(source=str(rows), eval_fraction=0))
    (runs / name / "spec.yaml").write_text(spec.to_yaml())
    return runs / name


@pytest.fixture
def tiny_runs(tiny_model, tmp_path):
    model = ModelSpec(name=str(tiny_model))
    make_run(tmp_path, "cook", model, COOK[:-HELD_OUT])
    make_run(tmp_path, "program", model, PROGRAM[:-HELD_OUT])
    return tmp_path


@pytest.fixture(scope="module")
def embedder(tiny_model):
    return Embedder.of_model(ModelSpec(name=str(tiny_model)))


def test_likeness_chooses_the_adapter_on_the_real_model(tmp_path):
    model = ModelSpec(name="smollm2-135m-instruct")
    make_run(tmp_path, "cook", model, COOK[:-HELD_OUT])
    make_run(tmp_path, "program", model, PROGRAM[:-HELD_OUT])
    router = nt.router("cook", "program", runs_dir=tmp_path)
    assert router.columns == ("base", "cook", "program")
    decisions = {text: router.route(text) for text in (*COOK[-HELD_OUT:], *PROGRAM[-HELD_OUT:])}
    assert [decision.column for decision in decisions.values()] == ["cook"] * HELD_OUT + ["program"] * HELD_OUT
    assert all(decision.score > decision.second_score + 0.5 for decision in decisions.values())
    first = decisions[COOK[-HELD_OUT]]
    assert first.second == "program"
    assert first.reason == (f"nearest to the data of cook: {first.score:.2f}; program has {first.second_score:.2f}")
    # Another subject each, then none of them; asked in words that stand in neither set.
    assert router.route("Can I boil potatoes in milk?").column == "cook"
    assert router.route("How do I open a csv file with pandas?").column == "program"
    for question in (
        "Who was king of Norway in 1240?",
        "Write a poem about the sea.",
        "What is the capital of France?",
    ):
        strange = router.route(question)
        assert strange.column == "base", question
        assert strange.reason.startswith(f"nearest is the data of {strange.second}, but {strange.score:.2f} is below")


def test_indexes_are_kept_beside_the_runs_and_used_again(tiny_runs):
    first = nt.router("cook", "program", runs_dir=tiny_runs)
    files = sorted(path.name for path in (tiny_runs / "cook").iterdir())
    assert files == ["adapter", "router.json", "router.safetensors", "rows.jsonl", "spec.yaml"]
    about = json.loads((tiny_runs / "cook" / "router.json").read_text())
    assert about["total"] == len(COOK) - HELD_OUT
    assert about["data"] == str(tiny_runs / "cook" / "rows.jsonl")
    # Read again, and not made: the rows are gone.
    (tiny_runs / "cook" / "rows.jsonl").unlink()
    again = nt.router("cook", "program", runs_dir=tiny_runs)
    for text in (COOK[-1], PROGRAM[-1]):
        assert again.route(text).column == first.route(text).column
        assert abs(again.route(text).score - first.route(text).score) < 0.01
    with pytest.raises(NbtuneError, match="The data is not there"):
        nt.router("cook", "program", runs_dir=tiny_runs, refresh=True)
    (tiny_runs / "cook" / "router.json").write_text("{")
    with pytest.raises(NbtuneError, match="The router's index cannot be read"):
        nt.router("cook", runs_dir=tiny_runs)


def test_one_adapter_and_the_base(tiny_runs, embedder):
    router = nt.router("cook", runs_dir=tiny_runs, embedder=embedder)
    near, far = router.route(COOK[-1]), router.route("Zebras migrate across Kenya yearly")
    assert (near.column, near.second) == ("cook", "base")
    assert near.reason.startswith("nearest to the data of cook: ")
    assert (far.column, far.second) == ("base", "cook")


def test_the_threshold_is_the_callers(tiny_runs, embedder):
    strict = nt.router("cook", "program", runs_dir=tiny_runs, embedder=embedder, threshold=0.999)
    assert isinstance(strict, BySimilarity)
    decision = strict.route(COOK[-1])
    assert (decision.column, decision.second) == ("base", "cook")
    assert decision.reason.endswith("is below 1.00")
    lax = BySimilarity(strict.nearest, threshold=-1)
    assert lax.route("Zebras migrate across Kenya yearly").column in ("cook", "program")
    with pytest.raises(NbtuneError, match="The threshold is out of range\nIt is 2"):
        BySimilarity(strict.nearest, threshold=2)


def test_any_prompt_gets_a_decision(tiny_runs, embedder):
    router = nt.router("cook", "program", runs_dir=tiny_runs, embedder=embedder)
    for prompt in ("", " ", "<|im_end|>", "\udcff", "a" * 1_000_000, "\0"):
        assert isinstance(router.route(prompt), Decision)


def test_an_adapter_without_its_run_needs_prompts(tiny_runs, tmp_path):
    adapter = tmp_path / "alone"
    (tiny_runs / "cook" / "adapter").rename(adapter)
    with pytest.raises(NbtuneError, match="Nobody knows what alone was trained on"):
        nt.router(adapter)
    router = nt.router(adapter, prompts={"alone": COOK})
    assert router.route(COOK[0]).column == "alone"
    assert (adapter / "router.safetensors").is_file()
    assert nt.router(adapter).route(COOK[0]).column == "alone"
    with pytest.raises(NbtuneError, match="There is no column 'other'"):
        nt.router(adapter, prompts={"other": COOK})
    with pytest.raises(NbtuneError, match="There are too few prompts to compare with\nprompts that were given has 1"):
        nt.router(adapter, prompts={"alone": ["a", "a", " "]})


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("router.json", b"{"),
        ("router.json", b"[]"),
        ("router.json", b'{"format": 99, "embedding": "", "model": "", "data": "", "total": 1}'),
        ("router.safetensors", b"\0" * 100),
        ("router.safetensors", b""),
    ],
)
def test_a_damaged_index_is_told(tmp_path, embedder, file, content):
    Index.of_texts(COOK, embedder).save(tmp_path)
    assert len(Index.read(tmp_path).vectors) == len(COOK)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(NbtuneError, match=r"index cannot be read\n.*router\.json.*\nMake it again"):
        Index.read(tmp_path)


def test_an_index_of_another_model_is_refused(embedder):
    index = Index.of_texts(COOK, embedder)
    other = Index(index.vectors, "other-model", "", 3)
    with pytest.raises(NbtuneError, match="The index of b is of another model\nIt was made with other-model"):
        Nearest({"a": index, "b": other}, embedder)


def test_an_index_holds_rows_of_all_parts_of_the_data(embedder):
    texts = [f"question {number}" for number in range(2000)]
    index = Index.of_texts(texts, embedder)
    assert index.vectors.shape == (MAX_ROWS, 32)
    assert index.total == 2000
    assert torch.equal(index.vectors[0], embedder(["question 0"])[0])
    assert torch.allclose(index.vectors[-1], embedder([f"question {int(255 * 2000 / 256)}"])[0])


def test_a_prompt_is_the_mean_of_its_tokens_without_control_tokens(embedder):
    ids = embedder.tokenizer("the zebra", add_special_tokens=False)["input_ids"]
    first = embedder.tokenizer.bos_token_id
    with torch.inference_mode():
        states = embedder.states(torch.tensor([[first, *ids]]))
    mean = states[2][0, 1:].float().mean(0)  # 0.75 of two layers, rounded
    assert torch.allclose(embedder(["the zebra", "<|im_start|>the zebra<|im_end|>"]), mean.expand(2, -1), atol=1e-6)
    assert embedder(["<|im_start|><|im_end|>"]).abs().sum() == 0


def test_the_base_of_an_engine_embeds_as_it_does_alone(tiny_model, embedder, tmp_path):
    spec = ModelSpec(name=str(tiny_model))
    model = get_peft_model(load(spec).model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    engine = Engine(spec, {"adapter": tmp_path / "adapter"})
    list(engine.stream({"adapter": [{"role": "user", "content": "Hello"}]}, max_new_tokens=1))
    shared = Embedder(engine.hidden_states, engine.tokenizer, embedder.origin)
    torch.testing.assert_close(shared(["the zebra"]), embedder(["the zebra"]), rtol=0.02, atol=1e-3)  # bf16, two orders


def test_a_rule_chooses(tiny_runs):
    router = nt.router("cook", runs_dir=tiny_runs, rule=lambda prompt: "cook" if "soup" in prompt else None)
    assert isinstance(router, ByRule)
    assert router.route("soup") == Decision("cook", 1.0, None, 0.0, "the rule says cook")
    assert router.route("nut") == Decision("base", 1.0, None, 0.0, "the rule says the base")
    with pytest.raises(NbtuneError, match="chose a column that there is not\nIt said 'x'; there are: base, cook"):
        ByRule(lambda prompt: "x", ["cook"]).route("a")
    with pytest.raises(NbtuneError, match="Give one"):
        nt.router("cook", runs_dir=tiny_runs, rule=len, patterns={})


def test_patterns_choose_in_their_order(tiny_runs):
    patterns = {"program": r"(?i)\bpython\b|\bcode\b", "cook": "(?i)soup"}
    router = nt.router("cook", "program", runs_dir=tiny_runs, patterns=patterns)
    assert isinstance(router, ByPattern)
    assert router.route("a PYTHON soup") == Decision(
        "program", 1.0, "cook", 1.0, "the pattern of program finds 'PYTHON'"
    )
    assert router.route("Soup!") == Decision("cook", 1.0, "base", 0.0, "the pattern of cook finds 'Soup'")
    assert router.route("nut") == Decision("base", 0.0, None, 0.0, "no pattern is found in the prompt")
    assert router.route("\udcff soup").column == "cook"


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(a|a)*b", r"(.*a){12}b", r"a*a*a*a*a*a*a*b"])
def test_no_pattern_is_catastrophic(pattern):
    router = ByPattern({"cook": pattern}, ["cook"])
    start = time.perf_counter()
    router.route("a" * 1_000_000 + "!")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("pattern", ["(", r"(?=a)b", r"(a)\1", "a{1,2000}"])
def test_patterns_that_cannot_be_used_are_told(pattern):
    with pytest.raises(NbtuneError, match=r"The pattern of cook cannot be used\n(.|\n)*no look-around"):
        ByPattern({"cook": pattern}, ["cook"])


def test_patterns_are_for_columns_and_similarity_needs_one(tiny_runs, embedder):
    with pytest.raises(NbtuneError, match="A pattern is for 'x', which is no column\nThere are: base, cook"):
        ByPattern({"x": "a"}, ["cook"])
    with pytest.raises(NbtuneError, match="There is nothing to route to"):
        nt.router("base", runs_dir=tiny_runs)
    assert BySimilarity(Nearest({"a": Index.of_texts(COOK, embedder)}, embedder)).columns == ("base", "a")
