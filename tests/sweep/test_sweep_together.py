"""Trials trained together: one group for those that share a base, a report of each, interrupted and gone on with."""

from __future__ import annotations

import json
import time

import psutil
import pytest
from toy import eventually

import nbtune as nt
from nbtune.errors import RunError
from nbtune.notebook import packaged
from nbtune.spec import RunSpec
from nbtune.sweep.group import asked_by
from nbtune.train import handover

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def params(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"What is {n} plus one?", "completion": f"It is {n + 1}."} for n in range(20)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"eval_fraction": 0.2, "eval_samples": 0, "dtype": "float32", "mlflow": False}
    return {"model": str(tiny_model), "data": str(folder / "sums.jsonl"), "max_steps": 30, "max_length": 64,
            "settings": settings}  # fmt: skip


@pytest.fixture(scope="module")
def sweep(params, tmp_path_factory):
    """A sweep that was interrupted while its group trained, and called again."""
    out = tmp_path_factory.mktemp("sweeps") / "swept"

    def call() -> nt.Sweep:
        return nt.sweep(packaged("train.ipynb"), {"r": [4, 8]}, params=params, jobs=2, together=True, out=out,
                        tracking=nt.TrackingSpec(mlflow=False))  # fmt: skip

    first, end = call(), time.monotonic() + 300
    while sum(trial.run is not None and trial.run.progress().step > 0 for trial in first.trials) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    first.interrupt()
    first.wait()
    assert [trial.state for trial in first.trials] == ["waiting", "waiting"]
    return call().wait()


def test_each_trial_is_a_run_of_the_group_with_a_report(sweep):
    assert [(t.state, t.attempt, t.run.spec.method.r) for t in sweep.trials] == [("finished", 2, 4), ("finished", 2, 8)]
    for trial in sweep.trials:
        starts = [event for event in trial.run.events() if event["type"] == "start"]
        assert [event["together"] for event in starts] == [2]
        assert trial.metrics["eval_loss_after"] == trial.run.summary()["eval_loss_after"]
        assert str(trial.metrics["eval_loss_after"])[:8] in trial.notebook.read_text()
    assert len(list((sweep.path / "runs").glob("*/spec.yaml"))) == 2
    assert sweep.best.run.adapter_path.exists()
    assert [path.name for path in sorted(sweep.path.glob("group-*.ipynb"))] == ["group-001.2.ipynb", "group-001.ipynb"]
    assert sum(event["type"] == "start" for event in sweep.events()) == 4


def test_a_group_that_is_killed_is_done_one_by_one(params, tmp_path):
    sweep = nt.sweep(packaged("train.ipynb"), {"r": [4, 8]}, params=params, jobs=2, together=True,
                     out=tmp_path / "swept", tracking=nt.TrackingSpec(mlflow=False))  # fmt: skip
    eventually(lambda: sum(trial.run is not None for trial in sweep.trials) == 2, "made the runs of a group")
    group = next(event for event in sweep.events() if event["type"] == "start")
    for kernel in psutil.Process(group["pid"]).children(recursive=True):
        kernel.kill()
    sweep.wait()
    assert [(trial.state, trial.attempt) for trial in sweep.trials] == [("finished", 2)] * 2
    assert all("together" not in event for t in sweep.trials for event in t.run.events() if event["type"] == "start")
    warnings = [event["message"] for event in sweep.events() if event["type"] == "warning"]
    assert [w for w in warnings if w.startswith("group-001 died, its trials are executed one by one: ")] == warnings


def test_the_preview_says_what_is_together_and_what_it_saves(params, tmp_path):
    def grouping(**space) -> str:
        same = {name: value for name, value in params.items() if name not in space}
        return nt.sweep(packaged("train.ipynb"), space, params=same, together="auto", out=tmp_path / "none",
                        start=False).grouping()  # fmt: skip

    said = grouping(r=[4, 8, 16])
    assert said.startswith("Trained together, on one base each: 3 trials; about 0.")
    assert grouping(per_device_train_batch_size=[1, 2]) == "No two of the trials can share a base model."
    assert not (tmp_path / "none").exists()


def test_a_notebook_is_asked_for_its_spec_and_nothing_runs(params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = asked_by(packaged("train.ipynb"), {**params, "r": 4})
    assert spec is not None
    assert spec.method.r == 4
    assert spec.training.eval_steps == 10  # which the notebook's own code says
    assert not list(tmp_path.iterdir())


def test_the_run_that_was_trained_is_handed_over_and_no_other(params, tmp_path, monkeypatch):
    spec = RunSpec(model=params["model"], data=params["data"])
    handover.hand_over(tmp_path, spec)
    assert handover.handed_over(spec) is None  # in no trial
    monkeypatch.setenv(handover.VARIABLE, str(tmp_path))
    assert handover.handed_over(spec) == tmp_path
    with pytest.raises(RunError, match=r"differ in training\.seed"):
        nt.train(spec.updated(seed=7))
