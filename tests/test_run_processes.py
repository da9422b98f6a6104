"""A run on two processes, as a notebook sees it: paused, stopped, gone on with alone; and processes that are killed."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import nbtune as nt
from nbtune import cli
from nbtune._processes import cores
from nbtune.errors import NbtuneError, RunError
from nbtune.run import Run
from nbtune.spec import RunSpec

ROWS = [{"instruction": f"Say {n} in English.", "output": f"number {n} " * (1 + n % 3)} for n in range(16)]
STEPS = 20
TRAINING = {
    "max_steps": STEPS, "max_length": 64, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
    "eval_steps": 0, "eval_samples": 0, "save_steps": 0, "learning_rate": 1e-2,
}  # fmt: skip
PATIENCE = 240  # seconds, on a machine that is busy with other things


@pytest.fixture(scope="module")
def spec(tiny_model):
    method = nt.LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "down_proj"])
    return RunSpec(
        model={"name": str(tiny_model), "dtype": "float32"}, data=ROWS, method=method, training=TRAINING,
        tracking={"mlflow": False},
    ).updated(eval_fraction=0.2)  # fmt: skip


@pytest.fixture
def two_cores(monkeypatch):
    """Of a machine that lends us one, two."""
    for module in ("nbtune.check", "nbtune._processes"):
        monkeypatch.setattr(sys.modules[module], "cores", lambda: max(2, cores()))


def until(condition, what):
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"never {what}"
        time.sleep(0.02)
    return value


def processes_of(run, module="nbtune.train.worker"):
    """What still runs of a run's processes."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(run) in process.cmdline() and module in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


def losses(run):
    return [event["loss"] for event in run.events() if event["type"] == "train"]


@pytest.mark.slow
def test_paused_stopped_and_gone_on_with_alone(spec, two_cores, tmp_path):
    alone = nt.train(spec, runs_dir=tmp_path).wait()
    run = nt.train(spec.updated(num_processes=2), runs_dir=tmp_path)
    until(lambda: run.progress().step >= 1 or run.status == "failed", "trained")
    run.pause()
    until(lambda: run.status == "paused", "paused")
    at = run.progress().step
    assert run.kept_step == at < STEPS
    assert len(processes_of(run.path)) == 2
    with pytest.raises(RunError, match="is paused"):
        run.resume(num_processes=1)
    time.sleep(0.5)
    assert run.progress().step == at
    assert run.resume() is run
    until(lambda: run.progress().step > at, "gone on")
    run.stop()
    run.wait(PATIENCE)
    assert run.status == "stopped"
    assert at < len(losses(run)) < STEPS
    assert run.adapter_path.exists()
    assert not processes_of(run.path)
    assert not (run.path / ".processes").exists()
    assert {event["sent_bytes"] for event in run.events() if event["type"] == "train"} == {5120}

    again = Run.open(run.path)
    with pytest.raises(NbtuneError, match="cannot be shared evenly"):
        again.resume(num_processes=4)
    assert again.resume(num_processes=1).wait().status == "finished"
    assert RunSpec.from_yaml(run.path / "spec.yaml") == again.spec
    assert again.spec.training.num_processes == 1
    assert losses(again) == pytest.approx(losses(alone), rel=1e-6)
    file = "adapter/adapter_model.safetensors"
    ours, theirs = load_file(run.path / file), load_file(alone.path / file)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-5
    assert again.summary()["steps"] == STEPS


def test_a_process_that_is_killed_ends_the_run(spec, two_cores, tmp_path):
    run = nt.train(spec.updated(num_processes=2), runs_dir=tmp_path)
    second = until(lambda: [p for p in processes_of(run.path) if p.environ().get("RANK") == "1"], "started")[0]
    second.kill()
    with pytest.raises(NbtuneError, match="Process 1 of 2 was killed\nSignal 9"):
        run.wait(PATIENCE)
    assert run.status == "failed"
    assert run.error.splitlines()[0] == "Process 1 of 2 was killed"
    assert run.events()[-1]["type"] == "end"
    assert not processes_of(run.path)
    assert not processes_of(run.path, "nbtune.train.launcher")
    assert run.summary()["status"] == "failed"


def test_processes_end_with_the_one_that_started_them(tmp_path):
    """In a kernel that is killed before the processes have even met."""
    (tmp_path / "spec.yaml").write_text("{}")
    code = (
        f"from pathlib import Path; from nbtune.train.launch import *; train_in_processes(Path({str(tmp_path)!r}), 2)"
    )
    kernel = subprocess.Popen([sys.executable, "-c", code])
    started = until(lambda: len(found := processes_of(tmp_path)) == 2 and found, "started")
    started += processes_of(tmp_path, "nbtune.train.launcher")
    assert len(started) == 3
    os.kill(kernel.pid, signal.SIGKILL)
    kernel.wait()
    assert not psutil.wait_procs(started, timeout=PATIENCE)[1]


def test_more_processes_than_the_machine_has_places_for(spec):
    found = nt.check(spec.updated(num_processes=4096, gradient_accumulation_steps=4096))
    problem = next(problem for problem in found if problem.setting == "training.num_processes")
    assert problem.severity == "error"
    assert problem.title == "There are no 4096 cores for 4096 processes"
    assert problem.remedy == f"Set num_processes to {cores()}."
    assert problem.remedies[0].changes == {"training.num_processes": cores()}


def test_the_command_line_asks_for_processes(spec, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["train", "--model", spec.model.name, "--data", str(tmp_path / "rows.jsonl"), "--set", "mlflow=false"]
    words += ["--set", "max_length=64", "--set", "target_modules=[q_proj]"]
    done = CliRunner().invoke(cli.app, [*words, "--nproc", "4096", "--runs-dir", str(tmp_path / "runs")])
    assert isinstance(done.exception, NbtuneError)
    assert done.exception.title == "There are no 4096 cores for 4096 processes"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "title", "severity", "remedy"),
    [
        pytest.param(
            {"gradient_accumulation_steps": 1}, "1 rows a step cannot be shared evenly by 2 processes", "error",
            {"training.gradient_accumulation_steps": 2}, id="fewer rows than processes",
        ),
        pytest.param(
            {"gradient_accumulation_steps": 3}, "3 rows a step cannot be shared evenly by 2 processes", "warning",
            {"training.gradient_accumulation_steps": 4}, id="an odd row",
        ),
        pytest.param(
            {"sharding": "full", "load_in_8bit": True}, "Quantised weights cannot be sharded", "error",
            {"training.sharding": "none"}, id="quantised",
        ),
        pytest.param(
            {"sharding": "full", "torch_compile": True}, "torch_compile and sharded weights do not go together",
            "error", {"training.torch_compile": False}, id="compiled",
        ),
        pytest.param(
            {"method": "full", "sharding": "full", "optim": "adamw_8bit"}, "adamw_8bit cannot train sharded weights",
            "error", {"training.optim": "adamw_torch_fused"}, id="8-bit optimiser",
        ),
    ],
)  # fmt: skip
def test_what_processes_cannot_share(spec, two_cores, changes, title, severity, remedy):
    wanted = spec.updated(num_processes=2, **changes)
    problem = next(problem for problem in nt.check(wanted) if problem.title == title)
    assert problem.severity == severity
    assert problem.remedies[0].changes == remedy
    assert title not in [problem.title for problem in nt.check(wanted.updated(**remedy))]


def test_the_plan_counts_what_each_process_has(spec):
    large = {"available_bytes": 10**12}
    full = spec.updated(method="full", per_device_train_batch_size=4, gradient_accumulation_steps=1)
    one, two = nt.plan(full, **large), nt.plan(full.updated(num_processes=2), **large)
    assert (one.micro_batch_size, one.accumulation, one.processes, one.sharded) == (4, 1, 1, False)
    assert (two.micro_batch_size, two.accumulation, two.processes, two.sharded) == (2, 2, 2, True)
    assert one.tokens_per_step == two.tokens_per_step
    assert two.parts["optimiser"] == pytest.approx(one.parts["optimiser"] / 2, rel=0.01)
    whole = nt.plan(full.updated(num_processes=2, sharding="none"), **large)
    assert not whole.sharded
    assert whole.parts["optimiser"] == one.parts["optimiser"]
    assert "each of 2 processes" in str(two)

    adapter = spec.updated(num_processes=2)
    assert not nt.plan(adapter, **large).sharded
    scarce = nt.plan(adapter, available_bytes=1)
    assert scarce.sharded  # shared where whole weights do not fit
    assert not nt.plan(adapter.updated(load_in_8bit=True), available_bytes=1).sharded


def test_the_base_is_counted_by_its_share():
    """Of the real model, whose blocks are many; a third of it lies outside them."""
    spec = RunSpec().updated(num_processes=4, gradient_accumulation_steps=4, dtype="float32")
    whole, shared = (nt.plan(spec.updated(sharding=kind), available_bytes=10**12) for kind in ("none", "full"))
    base, outside, block = (
        whole.parts["base weights"],
        4 * 49152 * 576,
        4 * (2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536),
    )
    assert shared.parts["base weights"] == pytest.approx(base / 4 + 2 * (outside + block), rel=0.01)


def test_settings_that_cannot_be():
    with pytest.raises(NbtuneError, match=r"num_processes = 0"):
        RunSpec.from_dict({"training": {"num_processes": 0}})
    with pytest.raises(NbtuneError, match=r"sharding = 'half'"):
        RunSpec.from_dict({"training": {"sharding": "half"}})
