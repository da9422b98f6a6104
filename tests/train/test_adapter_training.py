"""AdaLoRA, LoRA+ and LoRA-FA in runs on a small model: resumed runs give the bits of uninterrupted ones."""

from __future__ import annotations

import json
import time

import pytest
from safetensors.torch import load_file

import nbtune as nt
from nbtune.errors import SpecError
from nbtune.peft import AdaLoraConfig, LoraConfig
from nbtune.run import Run
from nbtune.spec import RunSpec

ROWS = [
    {"instruction": f"Say {n} in English.", "output": word}
    for n, word in enumerate("zero one two three four five".split())
]
TRAINING = {
    "max_steps": 60, "max_length": 64, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
    "eval_steps": 0, "eval_samples": 0, "save_steps": 5, "learning_rate": 1e-3,
}  # fmt: skip
TARGETS = ["q_proj", "down_proj"]
RUNS = {
    "adalora": (AdaLoraConfig(init_r=4, target_r=2, tfinal=1, lora_dropout=0.1, target_modules=TARGETS), {}),
    "lora+": (LoraConfig(r=4, target_modules=TARGETS), {"loraplus_lr_ratio": 8.0}),
    "lora-fa": (LoraConfig(r=4, target_modules=TARGETS), {"optim": "lorafa"}),
}


def train(name: str, model, folder) -> Run:
    method, training = RUNS[name]
    spec = RunSpec(
        model={"name": str(model), "dtype": "float32"},
        data=ROWS,
        method=method,
        training=TRAINING | training,
        tracking={"mlflow": False},
    )
    return nt.train(spec, runs_dir=folder)


def losses(run: Run) -> list[float]:
    return [event["loss"] for event in run.events() if event["type"] == "train"]


@pytest.fixture(scope="module", params=RUNS)
def finished(request, tiny_model, tmp_path_factory):
    run = train(request.param, tiny_model, tmp_path_factory.mktemp("runs")).wait()
    assert run.status == "finished", run.events()[-1]
    return request.param, run


def test_stopped_and_resumed_is_bit_identical_to_uninterrupted(finished, tiny_model, tmp_path):
    name, whole = finished
    run = train(name, tiny_model, tmp_path)
    while run.progress().step < 1:
        time.sleep(0.02)
    run.stop()
    run.wait()
    assert run.status == "stopped"
    assert 1 <= len(losses(run)) < 60
    again = Run.open(run.path).resume().wait()
    assert again.status == "finished"
    assert losses(again) == losses(whole)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again.adapter_path / file).read_bytes() == (whole.adapter_path / file).read_bytes()


def test_what_came_out(finished):
    name, run = finished
    tensors = load_file(run.adapter_path / "adapter_model.safetensors")
    config = json.loads((run.adapter_path / "adapter_config.json").read_text())
    state = load_file(max(run.path.glob("checkpoints/*")) / "weights.safetensors")
    trained = [value for key, value in tensors.items() if "lora_E" in key or ("lora_B" in key and name != "adalora")]
    assert len(trained) == 4
    assert all(value.abs().max() > 0 for value in trained if len(value))
    if name == "adalora":
        assert config["total_step"] == 60
        assert sum(map(sum, config["rank_pattern"].values())) == 2 * 4
        assert sum(len(value) for key, value in tensors.items() if key.endswith("lora_E")) == 2 * 4
        assert any(".importance_mean_" in key for key in state)
    if name == "lora-fa":
        assert not any("lora_A" in key for key in state)  # as it is frozen


def test_specs_that_cannot_be():
    for method, training in [("full", {"optim": "lorafa"}), ("full", {"loraplus_lr_ratio": 4.0})]:
        with pytest.raises(SpecError, match=r"training\.(optim is lorafa|loraplus_lr_ratio is for adapters)"):
            RunSpec.from_dict({"method": method, "training": training})
    with pytest.raises(SpecError, match="not together with optim lorafa"):
        RunSpec.from_dict({"training": {"optim": "lorafa", "loraplus_lr_ratio": 4.0}})
