"""What MLflow has of a sweep, whatever store it is."""

import json

from mlflow import MlflowClient

from nbtune.spec import RunSpec
from nbtune.sweep.tracking import SweepTracker
from nbtune.train import tracking as of_runs
from nbtune.train.events import EventLog


def made_elsewhere(runs_dir, name, tracking):
    """A run as it comes from another machine: its files, and no MLflow run yet."""
    path = runs_dir / name
    path.mkdir(parents=True)
    (path / "spec.yaml").write_text(RunSpec(tracking=tracking).to_yaml())
    log = EventLog(path)
    log.append({"type": "start", "step": 0, "total_steps": 1, "train_examples": 4, "eval_examples": 1})
    log.append({"type": "train", "step": 1, "loss": 1.5, "learning_rate": 1e-4})
    log.append({"type": "end", "step": 1, "status": "finished"})
    log.close()
    return path


def recorded(sweep, tracking, tmp_path):
    """A sweep of runs that told MLflow themselves and that did not: the client, and the sweep's id there."""
    warnings = []
    tracker = SweepTracker(sweep, tracking, {"space": {"r": [4, 8]}}, warnings.append)
    notebook = tmp_path / "001.ipynb"
    notebook.write_text("{}")
    own = made_elsewhere(sweep / "runs", "001-own", tracking)
    of_runs.sync(own)
    tracker.adopt(own)
    tracker.complete(own, notebook, tracked=True)
    tracker.complete(made_elsewhere(sweep / "runs", "002-other", tracking), notebook, tracked=True)
    tracker.complete(made_elsewhere(sweep / "runs", "003-silent", tracking), notebook, tracked=False)
    tracker.close("FINISHED", {"eval_loss_after": 1.25}, [notebook])
    assert warnings == []
    told = json.loads((sweep / "mlflow.json").read_text())
    return MlflowClient(told["tracking_uri"]), told["run_id"]


def require_parent_and_children(client, parent_id):
    parent = client.get_run(parent_id)
    assert (parent.info.status, parent.data.metrics) == ("FINISHED", {"eval_loss_after": 1.25})
    assert parent.data.params["space"] == "{'r': [4, 8]}"
    children = client.search_runs([parent.info.experiment_id], filter_string=f"tags.mlflow.parentRunId = '{parent_id}'")
    assert sorted(child.info.run_name for child in children) == ["001-own", "002-other"]
    for child in children:
        assert (child.info.status, child.data.metrics["loss"]) == ("FINISHED", 1.5)
        assert "001.ipynb" in {item.path for item in client.list_artifacts(child.info.run_id)}
