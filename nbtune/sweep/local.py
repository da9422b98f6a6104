"""Jobs on this machine: some at a time, each in a process with its share of the threads and the GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from nbtune._processes import WAIT_SECONDS, kill_family, threads_each
from nbtune.errors import SweepError
from nbtune.sweep.job import Ended, Job, result_file

# Of the notebook that a sweep is started from, which is not the one that a trial executes.
FOREIGN = ("JPY_SESSION_NAME", "JPY_PARENT_PID")


class LocalExecutor:
    """`jobs` processes at a time. GPUs are dealt out in turn; where there are fewer than jobs, some share one.

    Args:
        jobs: How many run at a time.
        folder: Where the processes' orders lie.
        gpus: What `CUDA_VISIBLE_DEVICES` may name; None is all that this process sees.
    """

    def __init__(self, jobs: int, folder: Path, gpus: list[str] | None = None) -> None:
        if jobs < 1:
            raise SweepError(f"jobs is {jobs}", "", "Give how many trials run at a time: 1 or more.")
        self._folder = folder
        self._shares = shares(jobs, visible_gpus() if gpus is None else gpus)
        self._running: dict[str, tuple[int, subprocess.Popen[bytes]]] = {}  # place and process, by name

    @property
    def free(self) -> int:
        return len(self._shares) - len(self._running)

    def start(self, job: Job) -> Mapping[str, Any]:
        place = min(set(range(len(self._shares))) - {place for place, _ in self._running.values()})
        file = self._folder / f"{job.name}.json"
        result_file(file).unlink(missing_ok=True)
        job.write(file)
        inherited = {name: value for name, value in os.environ.items() if name not in FOREIGN}
        with job.log.open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - this Python, and a file of ours
                [sys.executable, "-P", "-m", "nbtune.sweep.worker", str(file)],  # -P: no module of the folder's name
                stdin=subprocess.PIPE,  # closes with this process: see the worker
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=job.cwd,
                env={**inherited, **self._shares[place], **job.environment},
                start_new_session=True,  # Ctrl-C in the terminal is the sweep's to answer
            )
        self._running[job.name] = place, process
        return {"place": place, "pid": process.pid, "created": psutil.Process(process.pid).create_time()}

    def waits(self, name: str) -> bool:  # noqa: ARG002 - a protocol's
        return False  # it has had its place since it was started

    def ended(self) -> list[Ended]:
        done = [name for name, (_, process) in self._running.items() if process.poll() is not None]
        return [self._conclude(name) for name in done]

    def kill(self, name: str) -> None:
        process = self._running[name][1]
        kill_family(process.pid)
        process.wait(WAIT_SECONDS)

    def close(self) -> None:
        for name in list(self._running):
            self.kill(name)
            self._conclude(name)

    def _conclude(self, name: str) -> Ended:
        _, process = self._running.pop(name)
        code = process.wait()
        assert process.stdin is not None
        process.stdin.close()
        return Ended.read(result_file(self._folder / f"{name}.json"), name, code=code)


def shares(jobs: int, gpus: list[str]) -> list[dict[str, str]]:
    """The environment of each place: its threads, and its GPUs where there are any."""
    places = [{"OMP_NUM_THREADS": str(threads_each(jobs))} for _ in range(jobs)]
    if gpus:
        for number, place in enumerate(places):
            place["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[number::jobs] or [gpus[number % len(gpus)]])
    return places


def visible_gpus() -> list[str]:
    """The GPUs of this process, as `CUDA_VISIBLE_DEVICES` names them."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [name.strip() for name in told.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
