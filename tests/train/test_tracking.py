"""MLflow, for real: a SQLite store, a server that is missing and one that dies in the middle of a run."""

import json
import subprocess
import sys
import time

import pytest
from mlflow import MlflowClient
from mlflow_server import end, free_port, serve
from sweep_records import recorded, require_parent_and_children

import nbtune as nt
from nbtune import store
from nbtune.errors import RunError
from nbtune.run import Run
from nbtune.spec import RunSpec, TrackingSpec
from nbtune.train import tracking

ROWS = [{"prompt": f"{n} plus one is", "completion": f" {n + 1}"} for n in range(12)]


def spec(**parts):
    return RunSpec(
        data=ROWS,
        method=nt.LoraConfig(r=2, target_modules=["v_proj"]),
        training={
            "max_steps": 3,
            "max_length": 64,
            "gradient_accumulation_steps": 1,
            "eval_steps": 0,
            "eval_samples": 0,
            "save_steps": 2,
        },
        **parts,
    ).updated(eval_fraction=0.2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return nt.train(spec(), runs_dir=tmp_path_factory.mktemp("runs")).wait()


def logged(run):
    """The client and the MLflow run that belongs to `run`."""
    state = json.loads((run.path / "mlflow.json").read_text())
    client = MlflowClient(tracking_uri=state["tracking_uri"])
    return client, client.get_run(state["run_id"])


def test_the_store_is_a_sqlite_file_in_the_runs_folder_wherever_the_process_is(run):
    state = json.loads((run.path / "mlflow.json").read_text())
    assert state["tracking_uri"] == f"sqlite:///{run.path.parent / 'mlflow.db'}"
    assert (run.path.parent / "mlflow.db").exists()


def test_params_metrics_data_and_files_are_there(run):
    client, found = logged(run)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == run.id
    assert found.data.params["training.max_steps"] == "3"
    assert found.data.params["method.r"] == "2"
    losses = client.get_metric_history(found.info.run_id, "loss")
    expected = {event["step"]: event["loss"] for event in run.events() if event["type"] == "train"}
    assert {metric.step: metric.value for metric in losses} == expected
    assert [metric.step for metric in client.get_metric_history(found.info.run_id, "eval_loss")] == [0, 3]
    assert [found_input.tags[0].value for found_input in found.inputs.dataset_inputs] == ["training", "evaluation"]
    files = {item.path for item in client.list_artifacts(found.info.run_id)}
    assert {"adapter", "spec.yaml", "log.txt"} <= files
    adapter = {item.path for item in client.list_artifacts(found.info.run_id, "adapter")}
    assert "adapter/adapter_model.safetensors" in adapter


def test_a_notebook_can_be_attached(run, tmp_path):
    notebook = tmp_path / "executed.ipynb"
    notebook.write_text("{}")
    tracking.log_artifact(run.path, notebook)
    client, found = logged(run)
    assert "executed.ipynb" in {item.path for item in client.list_artifacts(found.info.run_id)}


def test_the_notebook_of_the_kernel_goes_along(run, tmp_path, monkeypatch):
    notebook = tmp_path / "mine.ipynb"
    notebook.write_text("{}")
    monkeypatch.setenv("JPY_SESSION_NAME", str(notebook))  # as jupyter_server sets it for a notebook's kernel
    tracking.sync(run.path)
    client, found = logged(run)
    assert "mine.ipynb" in {item.path for item in client.list_artifacts(found.info.run_id)}


def test_a_resumed_run_continues_the_same_mlflow_run(tmp_path):
    run = nt.train(spec(), runs_dir=tmp_path)
    while run.progress().step < 1:
        time.sleep(0.02)
    run.stop()
    run.wait()
    _, stopped = logged(run)
    assert stopped.info.status == "KILLED"
    Run.open(run.path).resume().wait()
    client, found = logged(run)
    assert found.info.run_id == stopped.info.run_id
    assert found.info.status == "FINISHED"
    assert sorted({m.step for m in client.get_metric_history(found.info.run_id, "loss")}) == [1, 2, 3]


def test_a_run_without_mlflow_leaves_no_store(tmp_path):
    nt.train(spec(tracking={"mlflow": False}), runs_dir=tmp_path).wait()
    assert not (tmp_path / "mlflow.db").exists()


def test_four_processes_may_create_the_store_at_once(tmp_path):
    code = (
        "from pathlib import Path; from nbtune.spec import TrackingSpec; from nbtune import store as t; "
        f"d = Path({str(tmp_path)!r}); client = t.initialise(t.tracking_uri(TrackingSpec(), d), d); "
        "print(len(client.search_experiments()))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate()[0].split()[-1] for process in processes] == ["1"] * 4
    assert all(process.returncode == 0 for process in processes)


def test_an_unreachable_server_is_refused_quickly():
    began = time.monotonic()
    with pytest.raises(RunError, match="does not answer"):
        store.require_reachable("http://127.0.0.1:9")
    assert time.monotonic() - began < 10


@pytest.mark.slow
def test_a_server_that_dies_costs_the_training_nothing_and_gets_the_rest_later(tmp_path, monkeypatch):
    for name, value in {"MAX_RETRIES": "1", "TIMEOUT": "3", "BACKOFF_FACTOR": "0"}.items():
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    port = free_port()
    server = serve(port, tmp_path)
    run = nt.train(spec(tracking=TrackingSpec(tracking_uri=f"http://127.0.0.1:{port}")), runs_dir=tmp_path / "runs")
    try:
        while run.progress().step < 1:
            time.sleep(0.02)
    finally:
        end(server)
    run.wait()
    assert run.status == "finished"
    assert any("nbtune sync" in event["message"] for event in run.events() if event["type"] == "warning")

    monkeypatch.undo()  # this one is waited for
    server = serve(port, tmp_path)
    try:
        tracking.sync(run.path)
        client, found = logged(run)
        assert found.info.status == "FINISHED"
        assert sorted(m.step for m in client.get_metric_history(found.info.run_id, "loss")) == [1, 2, 3]
        assert "adapter" in {item.path for item in client.list_artifacts(found.info.run_id)}
        require_parent_and_children(*recorded(tmp_path / "sweep", run.spec.tracking, tmp_path))  # of a sweep
    finally:
        end(server)
