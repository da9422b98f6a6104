"""Runs with 8-bit AdamW and with compiled blocks, on a tiny model; what check says of settings that want a GPU."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import nbtune as nt
from nbtune.models import load_tokenizer
from nbtune.run import Run
from nbtune.spec import ModelSpec, RunSpec

ROWS = [{"instruction": f"Say {word}.", "output": word * 3} for word in "zero one two three four five".split()]
SHORT = {
    "max_steps": 4, "max_length": 64, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
    "eval_steps": 0, "eval_samples": 0, "save_steps": 2, "learning_rate": 1e-2,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = load_tokenizer(ModelSpec())
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return str(folder)


def train(model: str, folder, **training) -> Run:
    spec = RunSpec(model=model, data=ROWS, method={"r": 64}, training=SHORT | training, tracking={"mlflow": False})
    run = nt.train(spec, runs_dir=folder).wait()
    assert run.status == "finished", run.events()[-1]
    return run


def forget_all_after_the_first_checkpoint(run: Run) -> None:
    """As if the process had been killed then."""
    for later in sorted((run.path / "checkpoints").iterdir())[1:]:
        shutil.rmtree(later)
    lines = (run.path / "events.jsonl").read_text().splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if '"type": "checkpoint"' in line)
    (run.path / "events.jsonl").write_text("".join(lines[: first + 1]))


def losses(run: Run) -> list[float]:
    return [event["loss"] for event in run.events() if event["type"] == "train"]


def test_eight_bits_train_as_32_do_and_resume_bit_for_bit(tiny_llama, tmp_path):
    whole = train(tiny_llama, tmp_path / "whole", optim="adamw_bnb_8bit")
    exact = train(tiny_llama, tmp_path / "exact")
    assert losses(exact)[-1] < losses(exact)[0]
    assert losses(whole) == pytest.approx(losses(exact), rel=0.01)
    assert losses(whole) != losses(exact)
    half = train(tiny_llama, tmp_path / "half", optim="adamw_bnb_8bit")
    forget_all_after_the_first_checkpoint(half)
    again = Run.open(half.path).resume().wait()
    assert again.status == "finished"
    assert losses(again) == losses(whole)
    file = "adapter_model.safetensors"
    assert (again.adapter_path / file).read_bytes() == (whole.adapter_path / file).read_bytes()


@pytest.mark.slow
def test_a_run_with_compiled_blocks_tells_its_break_even(tiny_llama, tmp_path):
    run = train(tiny_llama, tmp_path / "compiled", torch_compile=True)
    plain = train(tiny_llama, tmp_path / "plain")
    assert losses(run) == pytest.approx(losses(plain), rel=0.01)
    (event,) = [event for event in run.events() if event["type"] == "compile"]
    assert event["compile_seconds"] > 0
    assert event["step_seconds_before"] > 0
    assert event["message"].startswith("Compiled the blocks in ")


@pytest.mark.parametrize(
    ("training", "wanted"),
    [
        ({"activation_offloading": True}, "activation_offloading needs a GPU"),
        ({"activation_offloading": True, "gradient_checkpointing": False}, "activation_offloading would do nothing"),
        ({"optim": "paged_adamw_8bit"}, "Paging needs a GPU"),
        ({"torch_compile": True, "gradient_checkpointing": True}, "torch_compile would do nothing"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_check_warns_of_what_a_cpu_has_no_use_for(tiny_llama, training, wanted):
    spec = RunSpec(model=tiny_llama, data=ROWS, training=SHORT | training, tracking={"mlflow": False})
    told = {problem.title: problem for problem in nt.check(spec)}
    assert told[wanted].severity == "warning"
    assert not [problem for problem in told.values() if problem.severity == "error"]


def test_check_refuses_what_cannot_be(tiny_llama, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    both = {"torch_compile": True, "activation_offloading": True}
    spec = RunSpec(model=tiny_llama, data=ROWS, training=SHORT | both, tracking={"mlflow": False})
    errors = {problem.title: problem for problem in nt.check(spec) if problem.severity == "error"}
    assert "/no/such/compiler" in errors["This machine cannot compile the model"].message
    assert errors["torch_compile and activation_offloading do not go together"].setting == "training.torch_compile"
