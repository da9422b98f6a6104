"""Sweeps on Ray: one Ray for all tests, which a sweep of another process started and which ends with that process."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from toy import PATIENCE, eventually, write_toy

import nbtune as nt
from nbtune import cli
from nbtune.errors import SweepError
from nbtune.sweep.cluster import Cluster
from nbtune.sweep.cluster_driver import share
from nbtune.sweep.ledger import Ledger

pytestmark = pytest.mark.slow
UNTRACKED = nt.TrackingSpec(mlflow=False)

SCRIPT = """
import sys
import nbtune as nt
out, gate = sys.argv[2:]
nt.sweep(sys.argv[1], {"wait_for": [gate]}, out=out, jobs=8, ray="local", tracking=nt.TrackingSpec(mlflow=False)).wait()
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy") / "toy.ipynb")


@pytest.fixture(scope="module")
def other(toy, tmp_path_factory):
    """A sweep in another process with a Ray of its own, whose trial waits."""
    folder = tmp_path_factory.mktemp("other")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_AUTH_MODE", "token")
        patched.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # that Ray listens to 127.0.0.1 alone
        patched.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        out, gate = folder / "sweep", folder / "gate"
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, toy, out, gate], cwd=folder)

        def ready():
            assert process.poll() is None, "the other sweep ended"
            return list(out.glob("runs/001-*/events.jsonl"))

        eventually(ready, "events of its trial")
        yield process, out
        process.kill()


@pytest.fixture(scope="module")
def address(other):
    return next(event["ray"] for event in Ledger(other[1]).events() if event["type"] == "start")


@pytest.fixture(scope="module")
def sweep(toy, address, tmp_path_factory):
    """Four trials: one that a person stops, one that fails, one whose Ray process is killed, one that falls behind.

    Their data is named by a path that leads elsewhere in another process, so that it has to be shipped.
    """
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        (folder / "rows.txt").write_text("some rows")
        params = {"steps": 12000, "data": "/proc/self/cwd/rows.txt"}
        sweep = nt.sweep(toy, {"do": ["train", "raise", "hang"]}, params=params, out="out", jobs=4, ray=address,
                         halving=nt.Halving(first=2, factor=2), tracking=UNTRACKED)  # fmt: skip

        def worker():
            assert sweep.status == "running", sweep.wait()
            log = sweep.path / "003.log"
            return log.exists() and "Executing" in log.read_text() and int(log.read_text().split()[5])

        family = psutil.Process(eventually(worker, "the third at work")).children(recursive=True)
        os.kill(worker(), signal.SIGKILL)
        eventually(lambda: sweep.trial(1).run and sweep.trial(1).run.status == "running", "events of the first")
        sweep.add(loss=2.0)
        eventually(lambda: len(sweep.trials) == 4 and sweep.trial(4).state == "stopped early", "behind")
        sweep.stop(1)
        sweep.wait(PATIENCE)
    return sweep, family, folder


def test_trials_end_as_they_do_here(sweep):
    stopped, failed, died, behind = sweep[0].trials
    assert sweep[0].status == "finished"
    assert (stopped.state, failed.state, died.state, behind.state) == ("stopped", "failed", "died", "stopped early")
    assert stopped.metrics["eval_loss_after"] == 1.0
    assert behind.metrics["eval_loss_after"] == 2.0
    assert 2 <= behind.metrics["steps"] < 12000
    assert "a cell that fails" in failed.error
    assert "Its Ray worker ended" in died.error or "Its machine was lost" in died.error
    assert sweep[0].best == stopped


def test_runs_logs_and_notebooks_are_collected(sweep):
    stopped, failed, *_ = sweep[0].trials
    assert [event["type"] for event in stopped.run.events()][:: len(stopped.run.events()) - 1] == ["start", "end"]
    assert (stopped.run.path / "adapter").is_dir()
    assert "a cell that fails" in failed.notebook.read_text()
    assert "Executing notebook" in failed.log.read_text()
    assert "nbtune-trial-" not in stopped.notebook.read_text() + failed.error + (failed.log.read_text())


def test_data_is_shipped_to_a_machine_that_does_not_see_it(sweep):
    original = (sweep[2] / "rows.txt").stat().st_ino
    report = sweep[0].trial(1).notebook.read_text()
    assert "read some rows inode" in report
    assert f"inode {original}" not in report


def test_a_killed_worker_leaves_no_processes(sweep):
    assert sweep[1]
    assert not psutil.wait_procs(sweep[1], timeout=30)[1]


def test_the_ray_of_others_goes_on(sweep, other):
    assert other[0].poll() is None
    assert nt.Sweep.open(other[1]).status == "running"


def test_a_sweep_that_is_killed_takes_its_ray_and_its_trials_along(other):
    process, out = other
    family = psutil.Process(process.pid).children(recursive=True)
    assert {"raylet", "gcs_server"} <= {member.name() for member in family}
    process.kill()
    process.wait()
    assert not psutil.wait_procs(family, timeout=60)[1]
    interrupted = nt.Sweep.open(out)
    assert (interrupted.status, interrupted.trial(1).state) == ("interrupted", "waiting")
    assert interrupted.trial(1).run.status == "interrupted"  # nobody holds its lock any more


def test_an_address_where_no_ray_is_is_refused_within_seconds(toy, tmp_path, monkeypatch, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    for given in (address, f"ray://{address}"):
        with pytest.raises(SweepError, match=f"No Ray answers at {given}"):
            nt.sweep(toy, {"loss": [1.0]}, ray=given, out=tmp_path / "s")
    with pytest.raises(SweepError, match="is no address"):
        nt.sweep(toy, {"loss": [1.0]}, ray="somewhere", out=tmp_path / "s")
    monkeypatch.setattr(sys, "argv", ["nbtune", "sweep", str(toy), "--set", "loss=1", "--ray", address])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "No Ray answers" in capsys.readouterr().err
    assert time.monotonic() - began < 30
    assert not (tmp_path / "s").exists()


def test_without_ray_it_says_what_to_install(toy, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as importlib knows a package that is not there
    with pytest.raises(SweepError, match=r"pip install 'nbtune\[cluster\]'"):
        nt.sweep(toy, {"loss": [1.0]}, ray="local", start=False)


def test_gpus_are_named_for_this_machine_only(toy):
    with pytest.raises(SweepError, match="gpus"):
        nt.sweep(toy, {"loss": [1.0]}, ray="10.0.0.1:6379", gpus=["0"], start=False)


@pytest.mark.parametrize(
    ("amounts", "jobs", "each"),
    [
        ([8], 1, 8),
        ([8], 3, 2),
        ([4, 4, 4], 4, 2),  # of 3 each, only one would find room on a machine
        ([4, 4, 4], 2, 4),
        ([2], 3, 0.5),
        ([1], 3, 0.3333),
        ([0, 0], 2, 0),
    ],
)
def test_a_trial_gets_what_lets_all_run_at_once(amounts, jobs, each):
    assert share(amounts, jobs) == each


def test_what_a_machine_of_the_cluster_has_is_the_limit():
    assert Cluster([{"CPU": 4, "memory": 4e9}, {"CPU": 2, "memory": 8e9}]).memory_bytes == 8_000_000_000
    assert Cluster([{"CPU": 4, "GPU": 1, "memory": 4e9}]).memory_bytes is None
