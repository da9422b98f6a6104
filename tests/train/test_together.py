"""Runs trained together on one base: the losses, files and ends of each are those of the run alone."""

from __future__ import annotations

import gc
import time

import pytest
from safetensors.torch import load_file

import nbtune as nt
from nbtune.errors import NbtuneError, RunError
from nbtune.run import Run
from nbtune.spec import RunSpec
from nbtune.together import train_together

ROWS = [
    {"instruction": f"Say the number {n} in English.", "output": word}
    for n, word in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())
]
SMALL = {
    "max_steps": 4, "max_length": 64, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
    "eval_steps": 2, "save_steps": 2, "learning_rate": 1e-2, "eval_samples": 0,
}  # fmt: skip
LORAS = [
    ({"r": 4, "target_modules": ["q_proj", "v_proj"]}, {"eval_samples": 1}),
    ({"r": 8, "lora_alpha": 32, "lora_dropout": 0.2}, {"learning_rate": 3e-3, "seed": 1}),
    ({"r": 2, "target_modules": ["down_proj", "o_proj"], "use_rslora": True},
     {"gradient_accumulation_steps": 1, "max_steps": 7, "lr_scheduler_type": "constant", "max_grad_norm": 0.1}),
    ({"r": 16, "target_modules": "all-linear", "lora_dropout": 0.1},
     {"optim": "lorafa", "seed": 2, "label_smoothing_factor": 0.1}),
]  # fmt: skip
METHODS = [
    ({"r": 4, "lora_dropout": 0.1}, {"loraplus_lr_ratio": 4.0, "eval_samples": 1}),
    ({"peft_type": "IA3"}, {"seed": 3}),
    ({"r": 4, "use_dora": True, "lora_dropout": 0.1}, {}),
    ({"peft_type": "OFT", "oft_block_size": 8}, {}),
    ({"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "tfinal": 1}, {}),
    ({"peft_type": "VERA", "r": 8}, {}),
    ({"r": 4, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}, {}),
    ({"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}, {}),
    ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, {}),
]


def spec_of(model, method, training) -> RunSpec:
    spec = RunSpec(model={"name": str(model), "dtype": "float32"}, data=ROWS, method=method,
                   training=SMALL | training, tracking={"mlflow": False})  # fmt: skip
    return spec.updated(eval_fraction=0.2)


def curve(run: Run, *names: str) -> list[list[float]]:
    events = [event for event in run.events() if event["type"] in ("train", "eval")]
    return [[event[name] for event in events if name in event] for name in names or ("loss", "eval_loss", "grad_norm")]


def assert_same(together: Run, alone: Run) -> None:
    assert together.status == alone.status == "finished"
    for mine, theirs in zip(curve(together), curve(alone), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-4)
    assert curve(together)[0] == pytest.approx(curve(alone)[0], abs=1e-5)
    assert curve(together, "tokens", "learning_rate") == curve(alone, "tokens", "learning_rate")


@pytest.fixture(scope="module", params=[LORAS, METHODS], ids=["loras", "methods"])
def group(request, tiny_model, tmp_path_factory):
    """Specs, their runs together, and the same ones alone."""
    specs = [spec_of(tiny_model, *case) for case in request.param]
    runs = [run.wait() for run in train_together(specs, runs_dir=tmp_path_factory.mktemp("together"))]
    folder = tmp_path_factory.mktemp("alone")
    return specs, runs, [nt.train(spec, runs_dir=folder).wait() for spec in specs]


def test_each_curve_is_that_of_the_run_alone(group):
    _, together, alone = group
    for mine, theirs in zip(together, alone, strict=True):
        assert_same(mine, theirs)
        assert curve(mine)[0][0] != curve(mine)[0][-1]


def test_each_folder_is_that_of_the_run_alone(group):
    _, together, alone = group
    for mine, theirs in zip(together, alone, strict=True):
        assert {path.name for path in mine.path.iterdir()} == {path.name for path in theirs.path.iterdir()}
        assert [event["type"] for event in mine.events() if event["type"] != "status"] == [
            event["type"] for event in theirs.events() if event["type"] != "status"
        ]
        last = max((theirs.path / "checkpoints").iterdir()).name
        for file in ("adapter/adapter_model", f"checkpoints/{last}/weights", f"checkpoints/{last}/optimizer"):
            ours, wanted = (load_file(run.path / f"{file}.safetensors") for run in (mine, theirs))
            assert ours.keys() == wanted.keys()
            for name, tensor in ours.items():  # Adam's first steps are of one size however small a gradient is
                assert (tensor.float() - wanted[name].float()).abs().max() < 2e-3, (file, name)
        config = "adapter/adapter_config.json"
        assert (mine.path / config).read_text() == (theirs.path / config).read_text()
        ours, wanted = mine.summary(), theirs.summary()
        for name in ("steps", "total_steps", "trainable_parameters", "total_parameters", "train_tokens", "status"):
            assert ours[name] == wanted[name], name
    assert any(event.get("together") == len(together) for event in together[0].events())


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def plain(tiny_model, tmp_path_factory):
    """Two specs, and their curves alone."""
    specs = [spec_of(tiny_model, {"r": 4}, {"max_steps": 12, "seed": seed}) for seed in (0, 1)]
    folder = tmp_path_factory.mktemp("plain")
    return specs, [nt.train(spec, runs_dir=folder).wait() for spec in specs]


def bases():
    """The models that are in this process."""
    return [thing for thing in gc.get_objects() if type(thing).__name__ == "LlamaForCausalLM"]


def test_one_is_paused_and_stopped_the_other_goes_on_and_the_base_is_one(plain, tmp_path):
    specs, alone = plain
    before = len(bases())  # of other tests
    first, second = train_together(specs, runs_dir=tmp_path)
    until(lambda: first.progress().step >= 1)
    first.pause()
    until(lambda: first.status == "paused")
    assert len(bases()) == before + 1
    second.wait()
    assert second.status == "finished"
    assert first.status == "paused"
    first.resume()
    until(lambda: first.status == "running")
    first.stop()
    first.wait()
    assert first.status == "stopped"
    assert first.progress().step < 12
    assert_same(second, alone[1])
    assert_same(Run.open(first.path).resume().wait(), alone[0])  # goes on alone, from the checkpoint left here


def test_one_that_fails_leaves_the_others_as_they_were(plain, tmp_path):
    specs, alone = plain
    wild = specs[0].updated(lora_alpha=3 * 10**38, r=1, learning_rate=0.9)
    runs = train_together([specs[0], wild, specs[1]], runs_dir=tmp_path, run_ids=["a", "b", "c"])
    with pytest.raises(NbtuneError, match="The loss became"):
        runs[1].wait()
    assert runs[1].status == "failed"
    assert [run.id for run in runs] == ["a", "b", "c"]
    for mine, theirs in zip((runs[0], runs[2]), alone, strict=True):
        assert_same(mine.wait(), theirs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_length": 32}, r"training\.max_length"),
        ({"dtype": "bfloat16"}, r"model\.dtype"),
        ({"per_device_train_batch_size": 2}, r"training\.per_device_train_batch_size"),
        ({"data": "stdlib-docs"}, r"data\.source"),
        ({"method": "full"}, "trains every weight"),
        ({"torch_compile": True}, "compiled"),
        ({"num_processes": 2}, "several processes"),
        ({"activation_offloading": True}, "activation_offloading"),
    ],
)
def test_runs_that_cannot_share_a_base_are_refused(plain, tmp_path, changes, words):
    specs, _ = plain
    with pytest.raises(RunError, match=words):
        train_together([specs[0], specs[1].updated(**changes)], runs_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_left_behind(plain, tmp_path):
    specs, _ = plain
    with pytest.raises(NbtuneError, match="nowhere"):
        train_together([specs[0], specs[1].updated(target_modules=["nowhere"])], runs_dir=tmp_path)
    with pytest.raises(RunError, match="nothing to train"):
        train_together([], runs_dir=tmp_path)
    assert not list(tmp_path.iterdir())
