"""A run follows its data settings: mapping, mix, recipe and chat template, from another folder too."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

import nbtune as nt
from nbtune.chat_templates import chat_template
from nbtune.data import load_examples
from nbtune.models import load_tokenizer
from nbtune.run import Run

SMALL = {"max_steps": 1, "max_length": 64, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("work")
    table = [{"q": f"Question {n}?", "a": f"Answer {n}", "n": n} for n in range(20)]
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, table)))
    (folder / "more.json").write_text(json.dumps([{"instruction": "Do", "output": f"Done {n}"} for n in range(30)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        spec = nt.RunSpec(
            model={"name": str(tiny_model), "chat_template": "mistral"},
            data={
                "source": "table.jsonl",
                "columns": {"prompt": "{q} ({n})", "completion": "a"},
                "mix": [{"source": "more.json", "weight": 0.5}],
                "recipe": [{"step": "filter", "where": "n is None or n >= 10"}, {"step": "deduplicate"}],
                "eval_fraction": 0.1,
            },
            method={"r": 2, "target_modules": ["q_proj"]},
            training=SMALL,
            tracking={"mlflow": False},
        )
        return nt.train(spec, runs_dir=folder / "runs").wait()


def test_what_was_trained_on(run):
    (start,) = [event for event in run.events() if event["type"] == "start"]
    assert (start["train_examples"], start["eval_examples"]) == (18, 2)
    warnings = [event["message"] for event in run.events() if event["type"] == "warning"]
    assert "10 rows were left out: filter: not n is None or n >= 10" in warnings
    assert "20 rows were left out: not drawn from more.json" in warnings


def test_the_data_can_be_read_again_from_anywhere(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = Run.open(run.path).spec
    data = load_examples(spec.data, load_tokenizer(spec.model), 64)
    (start,) = [event for event in run.events() if event["type"] == "start"]
    assert data.fingerprint == start["data_fingerprint"]


def test_the_adapter_keeps_the_template(run):
    tokenizer = AutoTokenizer.from_pretrained(run.adapter_path)
    assert tokenizer.chat_template == chat_template("mistral")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False).endswith(
        "[INST] x [/INST]"
    )
