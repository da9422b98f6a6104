"""Every method as a run's method: the spec, its YAML and settings, the plan from shapes alone, what check says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_peft_wrong_results import SETTINGS
from tiny_models import llama

import nbtune as nt
from nbtune.models import attach_adapter, load, load_tokenizer, skeleton
from nbtune.peft import PeftModel, PeftType
from nbtune.peft.config import LayerConfig, config_class
from nbtune.spec import ModelSpec, RunSpec, settings

ROWS = [{"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(8)]
# What the defaults need to suit sizes of 64, 192, 576 and 1536.
NEEDED: dict[str, dict[str, Any]] = {
    "C3A": {"block_size": 64},
    "VBLORA": {"vector_length": 64},
    "TRAINABLE_TOKENS": {"token_indices": [3, 50, 95]},
}
TINY: dict[str, dict[str, Any]] = {
    **{getattr(peft, name)().peft_type.value if name != "AdaLoraConfig" else "ADALORA": values
       for name, values in SETTINGS.items()},
    "IA3": {},
    "LN_TUNING": {},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2, 28]},  # those of every conversation among them
    "PROMPT_TUNING": {"num_virtual_tokens": 5},
    "PREFIX_TUNING": {"num_virtual_tokens": 5},
    "P_TUNING": {"num_virtual_tokens": 5, "encoder_hidden_size": 16},
}  # fmt: skip


def spec_of(kind: str, given: dict[str, Any], model: Any = "smollm2-135m-instruct", **parts: Any) -> RunSpec:
    method = {"peft_type": kind, **given}
    return RunSpec(model=model, data=ROWS, method=method, tracking={"mlflow": False}, **parts)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    """The real tokenizer beside a small random model."""
    folder = tmp_path_factory.mktemp("tiny")
    model, tokenizer = small(), load_tokenizer(ModelSpec())
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small() -> Any:
    model = llama(hidden_size=64, intermediate_size=64, num_attention_heads=2)
    model.config.max_position_embeddings = 1024
    return model


@pytest.mark.parametrize("kind", list(PeftType))
def test_a_method_is_named_by_its_config_its_name_or_a_dict(kind, tmp_path):
    cls = config_class(kind)
    by_name = RunSpec(method=kind.lower())
    assert type(by_name.method) is cls
    assert by_name == RunSpec(method={"peft_type": kind}) == RunSpec(method=by_name.method)
    assert RunSpec(method=cls()).method == cls()
    assert getattr(nt, cls.__name__) is cls
    spec = spec_of(kind, TINY[kind])
    path = tmp_path / "spec.yaml"
    path.write_text(spec.to_yaml())
    assert RunSpec.from_yaml(path).method == spec.method
    assert RunSpec.from_dict(spec.to_dict()).method == spec.method


@pytest.mark.parametrize("kind", list(PeftType))
def test_every_setting_of_a_method_can_be_changed_by_its_name(kind):
    spec = RunSpec(method=kind)
    of_method = [setting for setting in settings(spec.method) if setting.part == "method"]
    assert of_method
    for setting in of_method:
        assert len(setting.help) > 10, setting.path
        assert spec.updated(**{setting.path: setting.default}) == spec, setting.path
    for name, value in TINY[kind].items():
        assert getattr(spec.updated(**{name: value}).method, name) == value


@pytest.mark.parametrize("kind", list(PeftType))
def test_planned_on_the_packaged_model_without_weights(kind):
    spec = spec_of(kind, NEEDED.get(kind, {}))
    assert nt.check(spec) == []
    trained, _ = attach_adapter(skeleton(spec.model), spec).get_nb_trainable_parameters()
    planned = nt.plan(spec)
    assert planned.trained_parameters == trained > 0
    assert planned.parts["optimiser"] == 8 * trained
    assert planned.parts["adapter"] >= (2 if kind == "LN_TUNING" else 4) * trained  # copies of norms stay in bf16
    quantised = nt.plan(spec_of(kind, NEEDED.get(kind, {}), {"load_in_4bit": True}))
    assert quantised.trained_parameters == trained
    assert quantised.parts["base weights"] < 0.6 * planned.parts["base weights"]


@pytest.mark.parametrize("kind", list(PeftType))
def test_the_plan_counts_what_peft_trains(kind, tiny_folder):
    spec = spec_of(kind, TINY[kind], str(tiny_folder))
    assert nt.check(spec) == []
    assert isinstance(spec.method, LayerConfig) or kind in ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")
    changes = {**spec.method.changes(), "task_type": "CAUSAL_LM"}
    if kind == "ADALORA":
        changes["total_step"] = 100
    torch.manual_seed(0)
    oracle = peft.get_peft_model(small(), getattr(peft, type(spec.method).__name__)(**changes))
    assert nt.plan(spec).trained_parameters == oracle.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("kind", {kind.family: kind for kind in PeftType}.values())
def test_a_run_trains_one_of_each_family_and_its_adapter_loads_again(kind, tiny_folder, tmp_path):
    training = {
        "max_steps": 2,
        "max_length": 64,
        "learning_rate": 1e-2,
        "eval_steps": 0,
        "eval_samples": 0,
        "save_steps": 0,
    }
    spec = spec_of(kind, TINY[kind], {"name": str(tiny_folder), "dtype": "float32"}, training=training)
    run = nt.train(spec, runs_dir=tmp_path).wait()
    assert run.status == "finished"
    start = next(event for event in run.events() if event["type"] == "start")
    assert start["trainable_parameters"] == nt.plan(spec).trained_parameters
    model, ids = load(spec.model).model, torch.arange(20)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(model, run.adapter_path)
        after = adapted(input_ids=ids).logits[:, -20:]  # some prompts have logits too
    assert (after - before).abs().max() > 1e-6
    assert adapted.peft_config["default"].peft_type == kind


@pytest.mark.parametrize(
    ("kind", "given", "setting", "words"),
    [
        ("BOFT", {"boft_block_size": 7}, "boft_block_size", "1, 2, 4, 8, 16, 32, 64"),
        ("BOFT", {"boft_n_butterfly_factor": 20}, "boft_block_size", "fewer butterfly factors"),
        ("C3A", {}, "block_size", "a divisor of 64"),
        ("VBLORA", {}, "vector_length", "Set vector_length to 64"),
        ("MISS", {"r": 100}, "r", "at most 64"),
        ("MISS", {"init_weights": "mini", "mini_r": 7}, "mini_r", "does not divide"),
        ("GRALORA", {"r": 35, "gralora_k": 5}, "gralora_k", "does not divide"),
        ("ROAD", {"group_size": 50}, "group_size", "group_size"),
        ("HRA", {"r": 100, "apply_GS": True}, "r", "Set r to 64 or less"),
        ("FOURIERFT", {"n_frequency": 10_000}, "n_frequency", "at most 4096"),
        ("WAVEFT", {"n_frequency": 10_000}, "n_frequency", "at most 4096"),
        ("SHIRA", {"r": 64}, "r", "at most 32"),
        ("LORA", {"r": 3, "init_lora_weights": "orthogonal"}, "r", "even r"),
        ("LORA", {"r": 100, "init_lora_weights": "pissa"}, "r", "Lower r"),
        ("LORA", {"init_lora_weights": "eva"}, "init_lora_weights", "initialize_lora_eva_weights"),
        ("LORA", {"target_modules": ["q_porj"]}, "target_modules", "q_proj"),
        ("LORA", {"target_modules": ["norm"]}, "target_modules", "LlamaRMSNorm"),
        ("LORA", {"layers_to_transform": [9]}, "target_modules", "layers_to_transform"),
        ("LORA", {"rank_pattern": {"q_porj": 2}}, "rank_pattern", "q_proj"),
        ("IA3", {"target_modules": ["nothing"]}, "target_modules", "nothing"),
        ("TRAINABLE_TOKENS", {}, "token_indices", "Name the tokens"),
        ("TRAINABLE_TOKENS", {"token_indices": [10**6]}, "token_indices", "49152 tokens"),
        ("OFT", {"oft_block_size": 1}, None, "no parameter to train"),
        ("PREFIX_TUNING", {"token_dim": 5}, None, "leave it out"),
    ],
)
def test_what_does_not_suit_the_model_is_a_problem_with_its_setting(kind, given, setting, words, tiny_folder):
    problems = nt.check(spec_of(kind, given, str(tiny_folder)))
    assert [problem.severity for problem in problems] == ["error"]
    problem = problems[0]
    assert problem.setting == (f"method.{setting}" if setting else None)
    assert words in str(problem)
    assert problem.title
    assert "leave it out" in problem.message or problem.remedy


def test_what_a_method_would_warn_about_is_a_warning(tiny_folder):
    for kind, given, words in [("HRA", {"r": 3}, "odd"), ("OFT", {"oft_block_size": 7}, "8 is used")]:
        problems = nt.check(spec_of(kind, given, str(tiny_folder)))
        assert [problem.severity for problem in problems] == ["warning"]
        assert words in problems[0].message
        assert problems[0].setting == f"method.{next(iter(given))}"


def test_what_does_not_suit_the_run_is_a_problem(tiny_folder):
    adalora = spec_of("ADALORA", {"tinit": 5, "tfinal": 5}, str(tiny_folder), training={"max_steps": 10})
    assert [problem.setting for problem in nt.check(adalora)] == ["method.tinit"]
    assert nt.check(adalora.updated(max_steps=11)) == []
    loftq = spec_of("LORA", {"init_lora_weights": "loftq"}, {"name": str(tiny_folder), "load_in_8bit": True})
    assert [problem.setting for problem in nt.check(loftq)] == ["method.init_lora_weights"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="only a CPU reads the scales by row")
def test_a_model_that_4_bits_do_not_suit_is_a_problem(tmp_path):
    llama().save_pretrained(tmp_path)  # 32 inputs
    load_tokenizer(ModelSpec()).save_pretrained(tmp_path)
    spec = spec_of("LORA", {}, {"name": str(tmp_path), "load_in_4bit": True}, training={"max_length": 64})
    assert [problem.setting for problem in nt.check(spec)] == ["model.load_in_4bit"]
    assert nt.check(spec.updated(load_in_4bit=False, load_in_8bit=True)) == []
