"""What a sweep remembers, and how the machine is divided."""

import json
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from nbtune._processes import kill_family
from nbtune.errors import SweepError
from nbtune.sweep.job import Ended, Job
from nbtune.sweep.ledger import FILE, Ledger
from nbtune.sweep.local import LocalExecutor, shares
from nbtune.sweep.trial import Trial, best, find, fold
from nbtune.sweep.worker import WholeFiles, mark

PLANNED = {"predicted_seconds": None, "predicted_bytes": None, "refused": ""}


def ended(number, state="finished", **metrics):
    return {
        "type": "end",
        "trial": number,
        "state": state,
        "run_id": "x",
        "metrics": metrics,
        "error": None,
        "seconds": 1.0,
    }


def test_the_trials_follow_from_the_events(tmp_path):
    trials = fold(tmp_path, [
        {"type": "open"},
        {"type": "trial", "trial": 1, "params": {"r": 4}, **PLANNED},
        {"type": "trial", "trial": 2, "params": {"r": 8}, **PLANNED},
        {"type": "trial", "trial": 3, "params": {"r": 9}, **PLANNED, "refused": "needs 9 GB"},
        {"type": "start", "trial": 1, "attempt": 1},
        ended(1, "failed"),
        {"type": "start", "trial": 2, "attempt": 1},
        {"type": "warning", "message": "MLflow"},
    ])  # fmt: skip
    assert [trial.state for trial in trials.values()] == ["failed", "running", "refused"]
    assert trials[3].error == "needs 9 GB"


def test_what_ran_when_the_sweep_was_killed_waits_for_another_attempt(tmp_path):
    begun = [
        {"type": "trial", "trial": 1, "params": {}, **PLANNED},
        {"type": "start", "trial": 1, "attempt": 1},
    ]
    assert fold(tmp_path, begun)[1].state == "running"
    assert fold(tmp_path, [*begun, {"type": "open"}])[1].state == "waiting"
    assert fold(tmp_path, [*begun, {"type": "close"}])[1].state == "waiting"
    again = fold(tmp_path, [*begun, {"type": "open"}, {"type": "start", "trial": 1, "attempt": 2}])[1]
    assert (again.state, again.attempt, again.run_prefix) == ("running", 2, "001.2")


def test_a_retry_forgets_how_it_ended(tmp_path):
    events = [
        {"type": "trial", "trial": 1, "params": {}, **PLANNED},
        {"type": "start", "trial": 1, "attempt": 1},
        ended(1, "died", steps=3),
        {"type": "retry", "trial": 1},
    ]
    assert fold(tmp_path, events)[1].state == "waiting"
    assert fold(tmp_path, [*events, {"type": "start", "trial": 1, "attempt": 2}])[1].metrics == {}


def test_half_a_line_is_no_event_and_the_next_one_is_whole(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.open()
    ledger.append("open")
    ledger.close()
    with (tmp_path / FILE).open("a") as file:
        file.write('{"type": "tri')  # as a kill leaves it
    assert [event["type"] for event in Ledger(tmp_path).events()] == ["open"]
    again = Ledger(tmp_path)
    again.open()
    again.append("close")
    again.close()
    assert [json.loads(line)["type"] for line in (tmp_path / FILE).read_text().splitlines()] == ["open", "close"]


def test_the_time_of_all_lives_counts(tmp_path):
    times = [(100, "open"), (130, "trial"), (500, "open"), (510, "close")]
    (tmp_path / FILE).write_text("".join(json.dumps({"time": t, "type": kind}) + "\n" for t, kind in times))
    assert Ledger(tmp_path).seconds() == 40


def test_the_best_is_one_that_ended_well(tmp_path):
    trials = [
        Trial(tmp_path, 1, {}, "finished", metrics={"eval_loss_after": 2.0}),
        Trial(tmp_path, 2, {}, "stopped early", metrics={"eval_loss_after": 1.5}),
        Trial(tmp_path, 3, {}, "timed out", metrics={"eval_loss_after": 1.0}),
        Trial(tmp_path, 4, {}, "finished"),
    ]
    assert best(trials, "eval_loss_after", maximise=False).number == 2
    assert best(trials, "eval_loss_after", maximise=True).number == 1
    assert best(trials, "steps", maximise=False) is None
    with pytest.raises(SweepError, match="no trial 9"):
        find({1: trials[0]}, 9)


def test_threads_and_gpus_are_dealt_out(monkeypatch):
    monkeypatch.setattr("nbtune._processes.cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert shares(3, []) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert [place["CUDA_VISIBLE_DEVICES"] for place in shares(2, ["0", "1", "2"])] == ["0,2", "1"]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in shares(3, ["4", "5"])] == ["4", "5", "4"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert shares(1, [])[0]["OMP_NUM_THREADS"] == "1"


def test_a_family_ends_with_those_in_sessions_of_their_own():
    child = "import subprocess, time; subprocess.Popen(['sleep', '600'], start_new_session=True); time.sleep(600)"
    parent = subprocess.Popen([sys.executable, "-c", child])
    deadline = time.monotonic() + 60
    while not (family := psutil.Process(parent.pid).children(recursive=True)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kill_family(parent.pid, created=psutil.Process(parent.pid).create_time() - 60)
    assert parent.poll() is None  # another process of that number, later: not the one that is meant
    kill_family(parent.pid)
    assert parent.wait(10) == -9
    assert not any(process.is_running() for process in family)


def test_a_job_survives_its_file_and_a_killed_process_says_so(tmp_path):
    job = Job("001", tmp_path / "a.ipynb", tmp_path / "b.ipynb", {"r": 4}, tmp_path, {"A": "b"}, tmp_path / "log")
    job.write(tmp_path / "001.json")
    assert Job.read(tmp_path / "001.json") == job
    assert "by signal 9" in Ended.read(tmp_path / "none.json", "001", code=-9).error
    with pytest.raises(SweepError):
        LocalExecutor(0, tmp_path)


def test_a_notebook_is_marked_and_always_whole(tmp_path):
    path = tmp_path / "a.ipynb"
    WholeFiles.write(nbformat.writes(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])), str(path))
    mark(path, "Ended.")
    assert [cell.source for cell in nbformat.read(path, 4).cells] == ["**Ended.**", "1"]
    mark(Path(tmp_path / "none.ipynb"), "Ended.")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.ipynb"]
