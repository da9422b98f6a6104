"""Trials that run: alone in their failure, stopped, resumed, and never twice."""

import csv
import json
import os
import resource
import signal
import subprocess
import sys

import nbformat
import pytest
from filelock import FileLock
from toy import PATIENCE, eventually, processes_of, write_toy

import nbtune as nt
from nbtune import cli
from nbtune._processes import cores
from nbtune.errors import NbtuneError, SweepError
from nbtune.shelf import in_trash
from nbtune.sweep.ledger import Ledger

UNTRACKED = nt.TrackingSpec(mlflow=False)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy") / "toy.ipynb")


def lines(path):
    with (path / "table.csv").open() as file:
        return list(csv.DictReader(file))


SCRIPT = """
import sys
import nbtune as nt
nt.sweep(sys.argv[1], {space!r}, params={{"loss": 1.5}}, out=sys.argv[2], tracking=nt.TrackingSpec(mlflow=False)).wait()
"""


@pytest.fixture(scope="module")
def killed(toy, tmp_path_factory):
    """A sweep whose process was killed in its third trial of four, and then the same call."""
    out = tmp_path_factory.mktemp("killed") / "sweep"
    gate = out.parent / "open"
    space = {"wait_for": ["", str(gate)], "do": ["train", "kill"]}  # the third trial waits for the gate
    process = subprocess.Popen([sys.executable, "-c", SCRIPT.format(space=space), str(toy), str(out)])

    def states():
        return [trial.state for trial in Ledger(out).trials().values()]

    eventually(lambda: states() == ["finished", "died", "running", "waiting"], "two ended and one running")
    eventually(lambda: list(out.glob("runs/003-*/events.jsonl")), "a run of the third")
    assert nt.Sweep.open(out).status == "running"
    with pytest.raises(SweepError, match="running already"):
        nt.sweep(toy, space, params={"loss": 1.5}, out=out, tracking=UNTRACKED)
    process.send_signal(signal.SIGKILL)
    process.wait()
    eventually(lambda: not processes_of(out), "the end of its trials")
    status = nt.Sweep.open(out).status
    first_life = (out / "trials.jsonl").read_text().splitlines()
    gate.touch()
    sweep = nt.sweep(toy, space, params={"loss": 1.5}, out=out, tracking=UNTRACKED).wait(PATIENCE)
    return sweep, status, first_life


def test_a_sweep_that_was_killed_is_finished_by_the_same_call(killed):
    sweep, status, first_life = killed
    assert status == "interrupted"
    assert sweep.status == "finished"
    assert [trial.state for trial in sweep.trials] == ["finished", "died", "finished", "died"]
    ledger = (sweep.path / "trials.jsonl").read_text().splitlines()
    assert ledger[: len(first_life)] == first_life  # only ever appended to


def test_nothing_that_ended_is_done_again(killed):
    sweep = killed[0]
    events = sweep.events()
    assert [event["trial"] for event in events if event["type"] == "start"] == [1, 2, 3, 3, 4]
    assert [trial.attempt for trial in sweep.trials] == [1, 1, 2, 1]
    sweep.start().wait(PATIENCE)
    assert len(sweep.events()) == len(events)  # there is nothing left to do


def test_the_notebook_of_the_interrupted_attempt_is_kept_aside(killed):
    path = killed[0].path
    assert (path / "003.attempt-1.ipynb").exists()
    assert nbformat.read(path / "003.ipynb", 4).metadata.papermill.exception is None


def test_the_run_of_the_interrupted_attempt_is_in_the_trash(killed):
    path = killed[0].path
    assert [run.id for run in reversed(nt.runs(path / "runs"))] == [killed[0].trial(n).run_id for n in (1, 3)]
    (thrown,) = in_trash(path / "runs")
    assert thrown.name.startswith("003-")


def test_a_trial_whose_kernel_dies_does_so_alone_and_its_notebook_says_it(killed):
    trial = killed[0].trial(2)
    assert "out of memory" in trial.error
    assert "The kernel died here" in trial.notebook.read_text()
    assert (trial.run, trial.run_id, trial.metrics) == (None, None, {})


def test_metrics_come_from_the_runs_own_files(killed):
    trial = killed[0].trial(3)
    assert trial.run_id.startswith("003.2-")
    assert trial.metrics["eval_loss_after"] == trial.run.summary()["eval_loss_after"] == 1.5
    assert trial.metrics["steps"] == 3


def test_the_table_and_the_best_are_made_from_the_ledger(killed):
    path, best = killed[0].path, killed[0].best
    rows = lines(path)
    assert [(row["trial"], row["do"], row["state"], row["attempts"]) for row in rows] == [
        ("1", "train", "finished", "1"),
        ("2", "kill", "died", "1"),
        ("3", "train", "finished", "2"),
        ("4", "kill", "died", "1"),
    ]
    assert (rows[0]["eval_loss_after"], rows[3]["eval_loss_after"]) == ("1.5", "")
    told = json.loads((path / "best.json").read_text())
    assert (told["trial"], told["run"], told["eval_loss_after"]) == (1, best.run_id, 1.5)
    assert str((path / "best").readlink()) == f"runs/{best.run_id}/adapter"


def test_it_executes_its_own_copy_of_the_notebook(killed):
    sweep = killed[0]
    assert sweep.design.notebook.path == sweep.path / "notebook.ipynb"
    assert nt.Sweep.open(sweep.path).design.identity() == sweep.design.identity()


def test_another_sweep_does_not_go_into_its_folder(killed, toy, tmp_path):
    with pytest.raises(SweepError, match="another space"):
        nt.sweep(toy, {"loss": [1.0, 2.0]}, out=killed[0].path, start=False)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(SweepError, match="is not empty"):
        nt.sweep(toy, {"loss": [1.0, 2.0]}, out=tmp_path, start=False)


def test_trials_are_stopped_by_a_person_and_by_their_losses(toy, tmp_path):
    sweep = nt.sweep(toy, {"loss": [1.0, 2.0]}, params={"steps": 12000}, out=tmp_path / "s", jobs=2, start=False,
                     tracking=UNTRACKED, halving=nt.Halving(first=2, factor=2))  # fmt: skip
    assert sweep.status == "created"
    assert not sweep.path.exists()
    sweep.start()
    eventually(lambda: len(sweep.trials) == 2 and sweep.trial(2).state == "stopped early", "behind")
    sweep.stop(1)
    sweep.wait(PATIENCE)
    good, bad = sweep.trials
    assert (good.state, bad.state) == ("stopped", "stopped early")
    assert bad.metrics["eval_loss_after"] == 2.0
    assert 2 <= bad.metrics["steps"] < 12000
    assert (bad.run.path / "adapter").exists()
    assert sweep.best == good
    threads = max(1, min(cores() // 2, int(os.environ.get("OMP_NUM_THREADS", "1000"))))
    assert f"threads {threads}" in good.notebook.read_text()


def test_a_trial_that_takes_too_long_is_ended_with_all_its_processes(toy, tmp_path):
    """Of a search, whose trials are chosen one after the other; before that it is interrupted."""
    call = {"notebook": toy, "space": {"seed": nt.Range(1, 9)}, "params": {"do": "hang"}, "sampler": "tpe", "trials": 1,
            "out": tmp_path / "s", "tracking": UNTRACKED}  # fmt: skip
    sweep = nt.sweep(**call)
    eventually(lambda: sweep.trials and sweep.trial(1).state == "running", "running")
    sweep.interrupt()
    assert sweep.wait(PATIENCE).status == "stopped"
    assert sweep.trial(1).state == "waiting"
    assert not processes_of(sweep.path)
    sweep = nt.sweep(**call, timeout=4).wait(PATIENCE)
    assert (sweep.status, sweep.trial(1).attempt) == ("finished", 2)
    assert 1 <= sweep.trial(1).params["seed"] <= 9
    assert (sweep.trial(1).state, sweep.trial(1).error) == ("timed out", "It took more than 4 s.")
    assert not processes_of(sweep.path)
    assert sweep.best is None


def test_a_notebook_that_makes_no_run_ends_the_sweep(toy, tmp_path):
    """At its first trial, for the next ones would make none either."""
    sweep = nt.sweep(toy, {"do": ["nothing", "train"]}, out=tmp_path / "s", tracking=UNTRACKED)
    with pytest.raises(SweepError, match="makes no runs"):
        sweep.wait(PATIENCE)
    assert sweep.status == "failed"
    empty, waiting = nt.Sweep.open(sweep.path).trials
    assert (empty.state, waiting.state) == ("failed", "waiting")
    assert "no run was there" in empty.error


def test_no_trial_starts_when_the_hours_are_spent(toy, tmp_path):
    call = {"notebook": toy, "space": {"loss": [1.0, 2.0]}, "out": tmp_path / "s", "tracking": UNTRACKED}
    sweep = nt.sweep(**call, hours=1e-9).wait(PATIENCE)
    assert (sweep.status, [trial.state for trial in sweep.trials]) == ("stopped", ["waiting", "waiting"])
    assert (sweep.path / "table.csv").read_text().count("waiting") == 2
    assert nt.sweep(**call, start=False).status == "stopped"
    again = nt.sweep(**call, trials=1, start=False)  # the budget is no part of what a sweep is
    assert "1 trial, 1 at a time" in str(again.preview)


def test_a_full_disk_loses_nothing(toy, tmp_path):
    """The ledger cannot grow beyond a point, in the middle of a line."""
    call = {"notebook": toy, "space": {"seed": list(range(100))}, "out": tmp_path / "s", "tracking": UNTRACKED}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    sweep = nt.sweep(**call, hours=1e-9, start=False)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        with pytest.raises(SweepError, match="the same call goes on"):
            sweep.start().wait(PATIENCE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    ledger = sweep.path / "trials.jsonl"
    written = ledger.read_bytes()
    assert len(written) == 6000
    assert 0 < len(sweep.trials) < 100
    assert nt.sweep(**call, hours=1e-9).wait(PATIENCE).status == "stopped"
    assert [trial.params["seed"] for trial in nt.Sweep.open(sweep.path).trials] == list(range(100))
    assert ledger.read_bytes().startswith(written[: written.rfind(b"\n") + 1])


def test_a_disk_that_is_full_in_the_middle_of_a_trial_fails_it_and_loses_nothing(toy, tmp_path, monkeypatch):
    """Its notebook can grow no further: what there was of it stays whole.

    The sweep goes on from another folder: its trials run where it was first called, where its relative paths lead.
    """
    first, other = tmp_path / "first", tmp_path / "other"
    for folder, rows in ((first, "x" * 200_000), (other, "of another folder")):
        folder.mkdir()
        (folder / "rows.txt").write_text(rows)  # the notebook prints them
    call = {"notebook": toy, "space": {"data": ["rows.txt"]}, "out": tmp_path / "s", "tracking": UNTRACKED}
    monkeypatch.chdir(first)
    nt.sweep(**call, hours=1e-9).wait(PATIENCE)
    monkeypatch.chdir(other)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        sweep = nt.sweep(**call).wait(PATIENCE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (trial,) = sweep.trials
    assert (sweep.status, trial.state) == ("finished", "failed")
    assert "File too large" in trial.error  # so this limit says no space left on device
    book = nbformat.read(trial.notebook, 4)
    assert book.cells[-1].source.strip().startswith("import os")
    assert not any("x" * 100_000 in str(cell.get("outputs")) for cell in book.cells)
    assert not list(sweep.path.glob(".*.ipynb.*"))  # no halves are left
    assert [row["state"] for row in lines(sweep.path)] == ["failed"]


def test_another_engine_runs_the_command_that_a_trial_is(toy, tmp_path, monkeypatch, capsys):
    """As Slurm would: from anywhere, without a standard input. The same call takes in what came of it."""
    out = tmp_path / "s"
    call = {"notebook": toy, "space": {"loss": [1.0, 2.0]}, "params": {"seed": 3}, "out": out, "tracking": UNTRACKED}
    commands = nt.sweep(**call, start=False).commands()
    assert nt.Sweep.open(out).status == "stopped"
    words = ["nbtune", "sweep", str(toy), "--set", "loss=1.0,2.0", "--param", "seed=3", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*words, "--commands"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out.splitlines() == commands
    done = subprocess.run(commands[1], shell=True, cwd="/", stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0
    assert nt.Sweep.open(out).trial(2).state == "waiting"  # until the sweep looks
    with FileLock(out / "orders" / "001.lock"), pytest.raises(SweepError, match="Trial 1 runs elsewhere"):
        nt.sweep(**call).wait(PATIENCE)
    assert nt.sweep(**call, start=False).commands() == commands[:1]
    waiting, taken = nt.Sweep.open(out).trials
    assert (waiting.state, taken.state, taken.metrics["eval_loss_after"]) == ("waiting", "finished", 2.0)
    assert taken.run.path.parent == out / "runs"
    assert taken.seconds > 0.15  # three steps


def test_what_cannot_run_writes_nothing(toy, tmp_path):
    with pytest.raises(NbtuneError):
        nt.sweep(toy, {"los": [1.0]}, out=tmp_path / "s")
    with pytest.raises(SweepError, match="jobs"):
        nt.sweep(toy, {"loss": [1.0]}, out=tmp_path / "s", jobs=0)
    assert not (tmp_path / "s").exists()
