"""Runs on the real 135M model: what they write, how they stop, resume, die and fail."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

import nbtune as nt
from nbtune.errors import NbtuneError, RunError
from nbtune.models import load
from nbtune.run import Run, runs
from nbtune.spec import ModelSpec, RunSpec
from nbtune.train import session
from nbtune.train.samples import Sampler

ROWS = [
    {"instruction": f"Say the number {n} in English.", "output": word}
    for n, word in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())
]
SMALL = {
    "max_steps": 4, "max_length": 64, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
    "eval_steps": 2, "save_steps": 2, "learning_rate": 1e-3, "eval_samples": 0,
}  # fmt: skip


def spec(**training):
    return RunSpec(
        data=ROWS,
        method=nt.LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "down_proj"]),
        training=SMALL | training,
        tracking={"mlflow": False},
    ).updated(eval_fraction=0.2)


def small(tiny_model, **training):
    """The same with a small random model, where the real one would show nothing more."""
    return spec(**training).updated(**{"model.name": str(tiny_model), "dtype": "float32"})


def losses(run):
    return [event["loss"] for event in run.events() if event["type"] == "train"]


def adapter_bytes(run):
    return (run.adapter_path / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run."""
    return nt.train(spec(), runs_dir=tmp_path_factory.mktemp("runs")).wait()


@pytest.fixture(scope="module")
def small_finished(tiny_model, tmp_path_factory):
    """An uninterrupted run of the small model."""
    return nt.train(small(tiny_model), runs_dir=tmp_path_factory.mktemp("small")).wait()


def test_a_run_writes_what_it_promises(finished):
    assert finished.status == "finished"
    names = {path.name for path in finished.path.iterdir()}
    assert {"spec.yaml", "events.jsonl", "log.txt", "checkpoints", "adapter", "summary.json"} <= names
    summary = json.loads((finished.path / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["steps"] == summary["total_steps"] == 4
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert summary["train_tokens_per_second"] > 0
    assert summary["trainable_parameters"] == 30 * 4 * (576 + 576 + 1536 + 576)
    assert 0.5e9 < summary["measured_peak_bytes"] < 8e9
    assert 0.5e9 < summary["planned_peak_bytes"] < 8e9
    assert [event["step"] for event in finished.events() if event["type"] == "eval"] == [0, 2, 4]


def test_the_first_learning_rates_are_those_of_the_schedule(finished):
    rates = [event["learning_rate"] for event in finished.events() if event["type"] == "train"]
    assert rates[0] == 0
    assert rates[1] == pytest.approx(1e-3)


def test_the_adapter_gives_the_same_logits_in_peft(finished):
    import peft

    from nbtune.peft import PeftModel

    ids = torch.arange(100, 140)[None]
    ours = PeftModel.from_pretrained(load(ModelSpec(dtype="float32")).model, finished.adapter_path)
    theirs = peft.PeftModel.from_pretrained(load(ModelSpec(dtype="float32")).model, finished.adapter_path)
    base = load(ModelSpec(dtype="float32")).model
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
        assert (ours(ids).logits - base(ids).logits).abs().max() > 1e-3


def test_stopped_and_resumed_is_bit_identical_to_uninterrupted(finished, tmp_path):
    run = nt.train(spec(), runs_dir=tmp_path)
    while run.progress().step < 1:
        time.sleep(0.02)
    run.stop()
    run.wait()
    assert run.status == "stopped"
    stopped_at = len(losses(run))
    assert 1 <= stopped_at < 4
    assert run.adapter_path.exists()
    assert Run.open(run.path).status == "stopped"

    again = Run.open(run.path).resume().wait()
    assert again.status == "finished"
    assert losses(again) == losses(finished)
    assert adapter_bytes(again) == adapter_bytes(finished)


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_paused_it_waits_and_goes_on_as_if_nothing_had_been(finished, tmp_path):
    run = nt.train(spec(), runs_dir=tmp_path)
    until(lambda: run.progress().step >= 1)
    run.pause()
    until(lambda: run.status == "paused")
    began, at = time.monotonic(), run.progress().step
    assert run.kept_step == at  # a kernel that dies now loses nothing
    assert run.progress().eta_seconds is None
    time.sleep(1.5)
    assert run.progress().step == at
    assert run.resume() is run
    assert run.wait().status == "finished"
    pauses = [event for event in run.events() if event["type"] in ("pause", "continue")]
    assert [(event["type"], event["step"]) for event in pauses] == [("pause", at), ("continue", at)]
    assert pauses[1]["seconds"] > 1.4
    assert run.summary()["train_seconds"] < run.summary()["ended"] - run.summary()["started"] - 1.4
    assert time.monotonic() - began > 1.5
    assert losses(run) == losses(finished)
    assert adapter_bytes(run) == adapter_bytes(finished)


def test_a_paused_run_is_told_by_another_object_and_stops(finished, tmp_path):
    """As from another kernel: a run that is locked and has no thread here is told through its folder."""
    run = nt.train(spec(), runs_dir=tmp_path)
    other = Run(run.path)
    assert Run.open(run.path) is run
    until(lambda: run.progress().step >= 1)
    other.pause()
    until(lambda: other.status == "paused")
    other.resume()
    until(lambda: other.status == "running")
    other.pause()
    until(lambda: other.status == "paused")
    at = run.progress().step
    other.stop()
    assert run.wait(60).status == other.status == "stopped"
    assert run.progress().step == at
    assert not (run.path / ".wish").exists()
    assert losses(Run.open(run.path).resume().wait()) == losses(finished)


def test_samples_change_no_loss_and_no_weight(small_finished, tiny_model, tmp_path):
    asked = small(tiny_model, eval_samples=2, sample_prompts=["Say the number six."])
    run = nt.train(asked, runs_dir=tmp_path).wait()
    samples = [event for event in run.events() if event["type"] == "samples"]
    assert [event["step"] for event in samples] == [0, 2, 4]
    prompts = [[sample["prompt"] for sample in event["samples"]] for event in samples]
    assert prompts[0] == prompts[1] == prompts[2]
    assert prompts[0][0] == "Say the number six."
    answers = {row["instruction"]: row["output"] for row in ROWS}
    assert [sample["reference"] for sample in samples[0]["samples"]] == [
        "",
        *(answers[text] for text in prompts[0][1:]),
    ]
    assert all(sample["answer"] for sample in samples[0]["samples"])
    assert losses(run) == losses(small_finished)
    assert adapter_bytes(run) == adapter_bytes(small_finished)
    assert "samples: step 4  samples 3" in run.log_tail(10)


def test_samples_of_a_model_that_cannot_generate_are_a_warning(tiny_model, tmp_path, monkeypatch):
    def broken(*args):
        raise NotImplementedError("no cache")

    monkeypatch.setattr(Sampler, "_generate", broken)
    run = nt.train(small(tiny_model, eval_samples=1, max_steps=1), runs_dir=tmp_path).wait()
    assert run.status == "finished"
    warnings = [event["message"] for event in run.events() if event["type"] == "warning"]
    assert warnings[0] == "There are no samples at step 0: no cache"


def test_killed_and_resumed_is_bit_identical_to_uninterrupted(finished, tmp_path):
    code = f"""
import nbtune as nt
from nbtune.spec import RunSpec
nt.train(RunSpec.from_yaml({str(finished.path / "spec.yaml")!r}), runs_dir={str(tmp_path)!r}, run_id="victim").wait()
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    events = tmp_path / "victim" / "events.jsonl"
    deadline = time.monotonic() + 240
    while not (events.exists() and '"step": 3' in events.read_text()):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()

    run = Run.open("victim", runs_dir=tmp_path)
    assert run.status == "interrupted"
    run.resume().wait()
    assert losses(run) == losses(finished)
    assert adapter_bytes(run) == adapter_bytes(finished)


def test_resuming_a_finished_run_changes_nothing(finished):
    before = adapter_bytes(finished), finished.events()
    assert Run.open(finished.path).resume().status == "finished"
    assert (adapter_bytes(finished), finished.events()) == before


def test_a_run_that_another_process_trains_cannot_be_resumed_here(finished):
    code = (
        "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
        "print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(finished.path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process"):
            Run.open(finished.path)._start()
        other.communicate("\n")


def test_accumulated_micro_batches_equal_one_large_batch(tiny_model, tmp_path):
    same = small(tiny_model).updated(lora_dropout=0.0, warmup_ratio=0.0, packing=False)
    one = nt.train(same.updated(per_device_train_batch_size=1, gradient_accumulation_steps=4), runs_dir=tmp_path)
    all_at_once = same.updated(per_device_train_batch_size=4, gradient_accumulation_steps=1)
    assert losses(one.wait()) == pytest.approx(losses(nt.train(all_at_once, runs_dir=tmp_path).wait()), rel=1e-5)


def test_full_fine_tuning_writes_a_model_that_transformers_loads(tmp_path):
    full = spec(max_steps=2, learning_rate=1e-4).model_copy(update={"method": "full"})
    run = nt.train(full, runs_dir=tmp_path).wait()
    assert run.summary()["trainable_parameters"] == run.summary()["total_parameters"]
    tuned = AutoModelForCausalLM.from_pretrained(run.path / "model", dtype=torch.float32)
    base = load(ModelSpec(dtype="float32")).model
    changed = [not torch.equal(a, b) for a, b in zip(tuned.parameters(), base.parameters(), strict=True)]
    assert all(changed)
    with pytest.raises(RunError, match="no adapter"):
        _ = run.adapter_path


def test_gradient_checkpointing_changes_no_loss(small_finished, tiny_model, tmp_path):
    run = nt.train(small(tiny_model, gradient_checkpointing=True), runs_dir=tmp_path).wait()
    assert run.summary()["checkpointed_layers"] == 2
    assert losses(run) == pytest.approx(losses(small_finished), rel=1e-6)


def test_a_failure_in_the_thread_is_kept_shown_and_raised(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(session, "load", broken)
    run = nt.train(spec(), runs_dir=tmp_path)
    with pytest.raises(RuntimeError, match="on fire"):
        run.wait()
    assert run.status == "failed"
    assert "on fire" in run.progress().message
    assert "on fire" in run.error
    assert "Traceback" in run.log_tail(50)
    assert "Traceback" in run.traceback
    assert run.error.startswith("RuntimeError: the disk is on fire")
    assert run.kept_step is None
    again = Run.open(run.path)
    assert again.status == "failed"
    with pytest.raises(RunError, match="on fire"):
        again.wait()
    monkeypatch.undo()
    assert again.resume().wait().status == "finished"


def test_memory_is_given_back(tmp_path):
    code = f"""
import psutil, nbtune as nt
from nbtune.spec import RunSpec
from nbtune.models import load
from nbtune.train import session
spec = RunSpec.from_dict({spec().to_dict()!r})
rows = {ROWS!r}
spec = RunSpec(data=rows, method=spec.method, training=spec.training, tracking=spec.tracking)
nt.check(spec)
before = psutil.Process().memory_info().rss
run = nt.train(spec, runs_dir={str(tmp_path)!r}).wait()
print((psutil.Process().memory_info().rss - before) / 1e6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) < 150  # MB; the model alone is 270


def test_memory_that_runs_out_while_loading_says_so(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(session, "load", broken)
    run = nt.train(spec(), runs_dir=tmp_path)
    with pytest.raises(RunError) as error:
        run.wait()
    assert error.value.title == "Memory ran out while the model was loaded"
    assert "load_in_4bit" in error.value.remedy
    assert "There was no room for base weights. Planned were" in error.value.message
    assert "Tried to allocate 2.00 GiB" in error.value.message


def test_a_label_and_a_note_and_a_name_that_finds_it(finished):
    again = Run.open(finished.path)
    again.rename("numbers in English")
    again.annotate("r is 4")
    assert (finished.name, finished.about.note) == ("numbers in English", "r is 4")
    assert Run.open("numbers in English", runs_dir=finished.path.parent).id == finished.id
    again.rename("")
    assert finished.name == finished.id.split("-", 2)[2]


def test_opening_by_name_and_listing(finished):
    folder = finished.path.parent
    assert Run.open(finished.id[-6:], runs_dir=folder).path == finished.path
    assert [run.id for run in runs(folder)] == [finished.id]
    with pytest.raises(RunError, match="Known runs"):
        Run.open("nobody", runs_dir=folder)


BAD = {
    "missing file": ({"data": "no/such/file.jsonl"}, "no/such/file.jsonl"),
    "broken line": ({"data": '{"instruction": "a", "output": "b"}\n{"instruction": '}, "line 2"),
    "no answer": ({"data": '{"messages": [{"role": "user", "content": "hi"}]}\n'}, "assistant"),
    "empty": ({"data": ""}, "empty"),
    "unknown target": ({"method": {"target_modules": ["q_porj"]}}, "q_proj"),
    "rank zero": ({"method": {"r": 0}}, "r"),
    "too long": ({"training": {"max_length": 9000}}, "8192"),
    "unknown model": ({"model": "no-such-model"}, "no-such-model"),
    "mlflow": ({"tracking": {"tracking_uri": "http://127.0.0.1:9"}}, "127.0.0.1:9"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_left_behind(tmp_path, name):
    values, message = BAD[name]
    if "\n" in values.get("data", "") or values.get("data") == "":
        (tmp_path / "data.jsonl").write_text(values["data"])
        values = {"data": str(tmp_path / "data.jsonl")}
    runs_dir = tmp_path / "runs"
    with pytest.raises(NbtuneError, match=message) as caught:
        nt.train(RunSpec.from_dict({"data": {"source": "stdlib-docs"}, **values}), runs_dir=runs_dir)
    assert "Traceback" not in str(caught.value)
    assert not runs_dir.exists()


def test_an_unwritable_runs_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NbtuneError, match="runs folder cannot be written"):
        nt.train(spec(), runs_dir=tmp_path / "file" / "runs")


@pytest.mark.parametrize("name", ["../outside", "a/b", ".hidden", ""])
def test_a_run_cannot_be_named_out_of_its_folder(tmp_path, name):
    with pytest.raises(RunError, match="cannot name a run"):
        nt.train(spec(), runs_dir=tmp_path / "runs", run_id=name)
    assert not (tmp_path / "runs").exists()


def test_a_run_is_never_overwritten(finished):
    with pytest.raises(RunError, match="already"):
        nt.train(spec(), runs_dir=finished.path.parent, run_id=finished.id)
