"""The `nbtune` command, as a person calls it."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from nbtune import cli
from nbtune.run import runs

SPEC = """
model: smollm2-135m-instruct
data: {{source: {data}, eval_fraction: 0.2}}
method: {{r: 4, target_modules: [q_proj]}}
training: {{max_steps: 3, max_length: 64, eval_steps: 0, eval_samples: 0, gradient_accumulation_steps: 1}}
"""


def nbtune(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "nbtune.cli", *map(str, arguments)], capture_output=True, text=True, **options
    )


@pytest.fixture
def here(monkeypatch, capsys):
    """The command in this process, where the libraries are there already: exit status, output, errors."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["nbtune", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *(text.replace("\n", " ") for text in capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    rows = [{"prompt": f"What is {n} plus one?", "completion": f"It is {n + 1}."} for n in range(20)]
    (path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "spec.yaml").write_text(SPEC.format(data=path / "sums.jsonl"))
    return path


@pytest.fixture(scope="module")
def trained(folder):
    return nbtune("train", folder / "spec.yaml", "--set", "max_steps=2", "--runs-dir", folder / "runs")


def test_train_trains_and_says_what_came_out(trained, folder):
    assert trained.returncode == 0, trained.stderr
    (run,) = runs(folder / "runs")
    assert run.summary()["steps"] == 2
    assert run.id in trained.stdout
    assert re.search(r"Held-out loss \d\.\d+ → \d\.\d+", trained.stdout)


def test_runs_lists_it_and_the_environment_names_the_folder(trained, folder, here, monkeypatch):
    monkeypatch.setenv("NBTUNE_RUNS", str(folder / "runs"))
    _, listed, _ = here("runs")
    (run,) = runs(folder / "runs")
    assert run.id in listed
    assert "finished" in listed
    assert "2/2" in listed


def test_check_says_that_it_is_ready_and_what_it_needs(folder, here):
    status, output, _ = here("check", folder / "spec.yaml", "--runs-dir", folder / "runs")
    assert status == 0
    assert re.search(r"Ready\. Needs [\d.]+ GB", output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "missing.yaml"), "no file missing.yaml"),
        (("train", "{spec}", "--set", "learning_rte=1"), "Did you mean learning_rate"),
        (("train", "{spec}", "--set", "r=0"), "at least 1"),
        (("train", "{spec}", "--set", "data.source=nothing.jsonl"), "nothing.jsonl"),
        (("resume", "nobody"), "Known runs"),
        (("arena", "nobody"), "Known runs"),
    ],
)
def test_a_users_error_is_told_without_a_traceback(folder, here, arguments, message):
    arguments = [argument.format(spec=folder / "spec.yaml") for argument in arguments]
    status, _, errors = here(*arguments, "--runs-dir", folder / "none")
    assert status == 1
    assert message in errors
    assert "Traceback" not in errors
    assert not (folder / "none").exists()


def test_a_users_error_is_the_status_of_the_process():
    done = nbtune("train", "missing.yaml")
    assert done.returncode == 1
    assert "no file missing.yaml" in done.stderr


def test_check_fails_where_there_is_an_error(folder, here):
    status, output, _ = here("check", folder / "spec.yaml", "--set", "max_length=9000")
    assert status == 1
    assert "8192" in output


def test_interrupted_in_the_terminal_it_stops_and_resume_goes_on(folder, tiny_model):
    runs_dir = folder / "interrupted"

    def interrupted(*arguments, step):
        """What `nbtune` printed, interrupted once its run has done this step."""
        command = [sys.executable, "-m", "nbtune.cli", *map(str, arguments), "--runs-dir", runs_dir]
        # Python does not hear an interrupt that the shell, as of a job in the background, has it ignore.
        hear = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=hear)
        try:
            deadline = time.monotonic() + 120
            while not any(run.progress().step >= step for run in runs(runs_dir)):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            return process.communicate(timeout=120)[0]
        finally:
            process.kill()

    assert "stopped" in interrupted(
        "train", folder / "spec.yaml", "--set", "max_steps=50000", "--set", f"model.name={tiny_model}", step=1
    )
    (run,) = runs(runs_dir)
    assert run.status == "stopped"
    step = run.progress().step

    assert "stopped" in interrupted("resume", run.id.split("-", 2)[2], step=step + 1)
    assert run.status == "stopped"
    steps = [event["step"] for event in run.events() if event["type"] == "train"]
    assert steps == list(range(1, steps[-1] + 1))


def test_ui_opens_mlflow_on_the_runs(trained, folder):
    from tests.train.test_tracking import free_port

    port = free_port()
    command = [sys.executable, "-m", "nbtune.cli", "ui", "--port", str(port), "--runs-dir", folder / "runs"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 300  # a new environment compiles and reads some thousand files first
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
                    assert answer.status == 200
                    break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.5)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_lab_opens_jupyterlab_on_the_wizard(tmp_path):
    from tests.train.test_tracking import free_port

    port = free_port()
    command = [sys.executable, "-m", "nbtune.cli", "lab", tmp_path / "work", "--no-browser", "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        told = ""
        while f"127.0.0.1:{port}/lab/tree/wizard.ipynb?token=" not in told:
            line = process.stderr.readline()
            assert line, told
            told += line
        assert (tmp_path / "work" / "wizard.ipynb").exists()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_the_demo_lowers_the_held_out_loss_by_a_quarter(tmp_path):
    done = nbtune("demo", "--no-chat", "--max-steps", "9", "--runs-dir", tmp_path, env=os.environ | {"COLUMNS": "160"})
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path)
    summary = run.summary()
    assert summary["eval_loss_after"] < 0.75 * summary["eval_loss_before"]
    assert summary["measured_peak_bytes"] < 4e9
    assert "after training" in done.stdout
    assert "mlflow.db" in done.stdout
    (notebook,) = (tmp_path / "notebooks").iterdir()
    assert notebook.stat().st_size < 1_000_000
    assert Path(run.adapter_path, "adapter_model.safetensors").exists()

    from mlflow import MlflowClient

    state = json.loads((run.path / "mlflow.json").read_text())
    files = MlflowClient(tracking_uri=state["tracking_uri"]).list_artifacts(state["run_id"])
    assert notebook.name in {file.path for file in files}
