"""MLflow follows the label and the note of a run; a server that is not there keeps neither from being kept."""

import json

import pytest
from mlflow import MlflowClient

from nbtune.errors import RunError
from nbtune.run import Run
from nbtune.train import tracking
from tests.train.test_tracking import free_port
from tests.widgets.replay import write_run


@pytest.fixture
def run(tmp_path) -> Run:
    """A run that MLflow knows."""
    made = write_run(tmp_path, "20261122-100000-amber-heron", 4, mlflow=True)
    tracking.sync(made.path)
    return made


def logged(run):
    state = json.loads((run.path / "mlflow.json").read_text())
    return MlflowClient(tracking_uri=state["tracking_uri"]).get_run(state["run_id"])


def test_the_name_and_the_note_follow(run):
    assert logged(run).info.run_name == run.id
    run.rename("baseline")
    run.annotate("r of 16 is enough")
    found = logged(run)
    assert found.info.run_name == "baseline"
    assert found.data.tags["mlflow.note.content"] == "r of 16 is enough"
    run.rename("")
    assert logged(run).info.run_name == run.id


def test_a_lost_server_is_named_at_once_and_sync_sends_it_later(run):
    state = json.loads((run.path / "mlflow.json").read_text())
    lost = state | {"tracking_uri": f"http://127.0.0.1:{free_port()}"}
    (run.path / "mlflow.json").write_text(json.dumps(lost))
    with pytest.raises(RunError, match="nbtune sync") as error:
        run.rename("baseline")
    assert error.value.title == "MLflow was not told"
    assert run.name == "baseline"
    (run.path / "mlflow.json").write_text(json.dumps(state))
    tracking.sync(run.path)
    assert logged(run).info.run_name == "baseline"
