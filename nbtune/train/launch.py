"""One run on several processes, of this machine or of Ray's, started by the process that watches it.

The first of them writes the run's events and its files. They read from a pipe that closes with the process that started
them, so they end with it whatever ended that. A process that fails leaves a report, by which the run's error names it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nbtune import _files, _ray
from nbtune._processes import kill_family, threads_each
from nbtune.errors import NbtuneError, RunError, told
from nbtune.train.events import mend, read_events

FOLDER = ".processes"  # in the run's: what is left of processes that fail
OUTPUT = "processes.log"  # in the run's: what the processes print


def train_in_processes(path: Path, count: int, *, ray: str | None = None) -> None:
    """Train the run in the folder `path` on `count` processes, and wait until they are gone.

    They are of this machine, or workers of the Ray at an address; "local" starts one.

    Raises NbtuneError: what the first one to fail raised, with its number and its traceback as a note.
    """
    reports = path / FOLDER
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir()
    module, more = ("launcher", []) if ray is None else ("on_ray", [ray])
    environment = dict(os.environ) if ray is None else _ray.environment(ray)
    with (path / OUTPUT).open("ab") as output:
        process = subprocess.Popen(  # noqa: S603 - this Python, and a folder of ours
            [sys.executable, "-P", "-m", f"nbtune.train.{module}", str(path), str(count), *more],
            stdin=subprocess.PIPE,  # closes with this process
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment, "OMP_NUM_THREADS": str(threads_each(count))},
            start_new_session=True,  # Ctrl-C in the terminal is the watcher's to answer
        )
    assert process.stdin is not None
    try:
        code = process.wait()
    finally:
        if process.poll() is None:
            kill_family(process.pid)
        process.stdin.close()  # which ends what a launcher that was killed has left
    mend(path)
    ended = [event["type"] for event in read_events(path)[-1:]] == ["end"]
    if code and not ended:  # after the end, all that can fail is the parting
        raise failure(path, count, code)
    shutil.rmtree(reports)


def report(folder: Path, rank: int | None, error: BaseException, traceback: str, *, follows: bool) -> None:
    """Leave word of what ended a process, or the whole; `follows` says that another one's end did."""
    ours = isinstance(error, NbtuneError)
    title, message, remedy = (error.title, error.message, error.remedy) if ours else (told(error), "", "")
    values = {
        "rank": rank, "time": time.time(), "follows": follows, "traceback": traceback, "title": title,
        "message": message, "remedy": remedy,
    }  # fmt: skip
    _files.write_text(folder / FOLDER / f"rank-{rank}.json", json.dumps(values))


def leave_exit_codes(folder: Path, codes: dict[int, int]) -> None:
    """Leave word of how processes ended, by rank; a negative code is a signal's number."""
    _files.write_text(folder / FOLDER / "codes.json", json.dumps(codes))


def failure(path: Path, count: int, code: int) -> NbtuneError:
    """The error of `count` processes that failed, of which `code` is left: that of the first that did so by itself."""
    reports: list[dict[str, Any]] = [
        json.loads(file.read_text(encoding="utf-8")) for file in (path / FOLDER).glob("rank-*.json")
    ]
    reports.sort(key=lambda report: report["time"])
    file = path / FOLDER / "codes.json"
    codes = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    killed = {rank: -code for rank, code in codes.items() if code < 0 and -code != signal.SIGTERM}
    remedy = f"What the processes printed is in {path / OUTPUT}."
    if own := [report for report in reports if not report["follows"]]:
        return _as_error(own[0], count)
    for rank, number in killed.items():
        return RunError(
            f"Process {rank} of {count} was killed",
            f"Signal {number} ({signal.Signals(number).name}) ended it; SIGKILL is what a machine does that is out of"
            " memory.",
            remedy,
        )
    if reports:
        return _as_error(reports[0], count)
    return RunError(f"The {count} processes of the run could not go on", f"They ended with code {code}.", remedy)


def _as_error(report: dict[str, Any], count: int) -> NbtuneError:
    where = f"Process {report['rank']} of {count}"
    error = RunError(
        report["title"], "\n".join(filter(None, (f"{where} failed.", report["message"]))), report["remedy"]
    )
    error.add_note(f"{where}:\n{report['traceback']}")
    return error
