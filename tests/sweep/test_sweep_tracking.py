"""A sweep's record in MLflow, of runs that another machine made too. On a server: see tests/train/test_tracking.py."""

import time

import pytest
from mlflow_server import free_port
from sweep_records import recorded, require_parent_and_children
from toy import write_toy

import nbtune as nt
from nbtune.errors import RunError
from nbtune.spec import TrackingSpec
from nbtune.sweep.tracking import SweepTracker


def test_a_database_has_the_runs_of_other_machines_too(tmp_path):
    client, parent_id = recorded(tmp_path / "sweep", TrackingSpec(), tmp_path)
    require_parent_and_children(client, parent_id)
    again = SweepTracker(tmp_path / "sweep", TrackingSpec(), {}, print)  # the same call, later
    assert again.run_id == parent_id
    assert client.get_run(parent_id).info.status == "RUNNING"
    again.close("KILLED", {}, [])
    assert client.get_run(parent_id).info.status == "KILLED"


def test_a_server_that_is_gone_is_told_before_a_trial_starts(tmp_path):
    tracking = TrackingSpec(tracking_uri=f"http://127.0.0.1:{free_port()}")
    began = time.monotonic()
    sweep = nt.sweep(write_toy(tmp_path / "toy.ipynb"), {"loss": [1.0]}, tracking=tracking, out=tmp_path / "other")
    with pytest.raises(RunError, match="does not answer"):
        sweep.wait(60)
    assert time.monotonic() - began < 30
    assert [trial.state for trial in sweep.trials] == ["waiting"]
