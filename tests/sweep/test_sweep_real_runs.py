"""`train.ipynb` swept by the command, two trials at a time, with MLflow; every number from the runs' own files."""

import csv
import json
import sys
from contextlib import redirect_stdout
from io import StringIO

import pytest
from mlflow import MlflowClient
from toy import processes_of

import nbtune as nt
from nbtune import cli
from nbtune.notebook import packaged
from nbtune.peft import PeftConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def called(tiny_model, tmp_path_factory):
    """The command: its exit status, what it said, and where it was called."""
    folder = tmp_path_factory.mktemp("real")
    rows = [{"prompt": f"What is {n} plus one?", "completion": f"It is {n + 1}."} for n in range(20)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = "{eval_fraction: 0.2, eval_samples: 0}"
    params = {"model": tiny_model, "data": "sums.jsonl", "max_steps": 2, "max_length": 64, "settings": settings}
    command = ["nbtune", "sweep", str(packaged("train.ipynb")), "--set", "r=4,8", "--jobs", "2"]
    command += [word for name, value in params.items() for word in ("--param", f"{name}={value}")]
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(StringIO()) as out:
        patched.chdir(folder)
        patched.setenv("COLUMNS", "200")
        patched.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:  # in this process, where the libraries are there already
            cli.main()
    return ended.value.code or 0, out.getvalue(), folder


@pytest.fixture(scope="module")
def sweep(called):
    (path,) = (called[2] / "sweeps").iterdir()
    return nt.Sweep.open(path)


def test_the_command_shows_what_is_to_come_and_what_came(called, sweep):
    status, said, _ = called
    assert status == 0
    assert "2 trials, 2 at a time, about" in said
    assert "2 finished" in said
    assert f"Best: trial {sweep.best.number}" in said
    assert sweep.path.name.startswith("train-")
    assert not processes_of(sweep.path)


def test_each_trial_is_a_run_with_its_settings(sweep):
    assert [(trial.state, trial.run.spec.method.r, trial.run.status) for trial in sweep.trials] == [
        ("finished", 4, "finished"),
        ("finished", 8, "finished"),
    ]
    for trial in sweep.trials:
        summary = trial.run.summary()
        assert trial.metrics["eval_loss_after"] == summary["eval_loss_after"]
        assert trial.metrics["steps"] == 2
        assert trial.run_id.startswith(f"{trial.name}-")
        assert "eval_loss_after" in trial.notebook.read_text()  # the report has the summary of its run


def test_the_best_adapter_is_linked(sweep):
    best = min(sweep.trials, key=lambda trial: trial.metrics["eval_loss_after"])
    assert sweep.best.number == best.number
    assert PeftConfig.from_pretrained(sweep.path / "best").r == best.params["r"]


def test_the_table_has_a_line_a_trial(sweep):
    with (sweep.path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["r"], row["state"], row["notebook"]) for row in rows] == [
        ("4", "finished", "001.ipynb"),
        ("8", "finished", "002.ipynb"),
    ]
    assert [float(row["eval_loss_after"]) for row in rows] == [t.metrics["eval_loss_after"] for t in sweep.trials]


def test_mlflow_has_a_run_for_the_sweep_and_its_children(sweep):
    parent_id = json.loads((sweep.path / "mlflow.json").read_text())["run_id"]
    client = MlflowClient(f"sqlite:///{sweep.path / 'runs' / 'mlflow.db'}")
    parent = client.get_run(parent_id)
    assert (parent.info.status, parent.info.run_name) == ("FINISHED", sweep.id)
    assert parent.data.params["space"] == "{'r': [4, 8]}"
    assert parent.data.metrics["eval_loss_after"] == pytest.approx(sweep.best.metrics["eval_loss_after"])
    assert {item.path for item in client.list_artifacts(parent_id)} == {"table.csv", "best.json"}
    children = client.search_runs([parent.info.experiment_id], filter_string=f"tags.mlflow.parentRunId = '{parent_id}'")
    assert sorted(child.info.run_name for child in children) == [trial.run_id for trial in sweep.trials]
    for child in children:
        assert child.info.status == "FINISHED"
        assert f"{child.info.run_name[:3]}.ipynb" in {item.path for item in client.list_artifacts(child.info.run_id)}


def test_the_prediction_is_beside_what_was_measured(sweep):
    for trial in sweep.trials:
        assert trial.predicted_seconds > 0
        assert 0.5 < trial.predicted_bytes / trial.metrics["measured_peak_bytes"] < 2
