"""One trial on one machine of a Ray cluster: an actor that starts the trial's process there and tells how it goes on.

The process is the one that a job is everywhere (`nbtune.sweep.worker`). It ends when the actor does, whatever ended
that: its standard input closes.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from nbtune._processes import kill_family
from nbtune.sweep.inputs import Input, with_paths
from nbtune.sweep.job import Ended, Job, result_file
from nbtune.sweep.local import FOREIGN
from nbtune.sweep.mirror import Look, Sender
from nbtune.train.control import Wish, leave_wish

if TYPE_CHECKING:
    from ray import ObjectRef

PREFIX = "nbtune-trial-"
LOOK_SECONDS = 0.3  # between two looks at a trial that wrote nothing
FORGOTTEN_SECONDS = 60.0  # after which a folder whose trial was killed is cleared away

# Ray kills the children of an actor that ends, but not theirs. With a shell between, the trial's process lives on for
# the moment in which it ends the kernel and what that started.
SHELL = ("/bin/sh", "-c", 'exec 3<&0; "$@" <&3 3<&- & exec 3<&- </dev/null; wait $!', "trial")


@dataclasses.dataclass(frozen=True)
class Order:
    """A job, and what it takes to do it on another machine."""

    job: Job  # with the paths of the sweep's machine
    notebook: bytes
    cwd_inode: int
    inputs: Sequence[Input]
    shipped: Mapping[str, Mapping[str, Sequence[ObjectRef]]]  # of some inputs, by text: each file's chunks
    threads: int


def installed() -> str:
    """The version of nbtune on a machine of the cluster."""
    return version("nbtune")


class TrialActor:
    """What Ray makes an actor of: `missing`, then `begin`, then `look` until it says how the trial ended."""

    def __init__(self) -> None:
        _clear_away()
        self._folder = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
        self._lock = FileLock(self._folder / ".lock", thread_local=False)
        self._lock.acquire(timeout=0)
        self._sweep = self._folder / "sweep"  # what the sweep's folder is on its machine
        self._process: subprocess.Popen[bytes] | None = None
        self._name, self._file = "", self._folder / "job.json"
        self._sender = Sender(self._sweep, [], {})

    def missing(self, inputs: Sequence[Input]) -> list[str]:
        """Which of these this machine does not see, by their texts."""
        return [given.text for given in inputs if not given.is_here()]

    def begin(self, order: Order) -> None:
        """Start the trial's process. Raises OSError where the disk is full."""
        (self._sweep / "runs").mkdir(parents=True)
        notebook = self._sweep / order.job.notebook.name
        notebook.write_bytes(order.notebook)
        copies = {
            text: str(self._copy(number, text, files)) for number, (text, files) in enumerate(order.shipped.items())
        }
        renamed = {copies[given.text]: given.path for given in order.inputs if given.text in copies}
        cwd = order.job.cwd
        if not (cwd.is_dir() and cwd.stat().st_ino == order.cwd_inode):
            cwd = self._folder / "cwd"
            cwd.mkdir()
            copies |= {given.text: given.path for given in order.inputs if given.text not in copies}
        job = self._here(dataclasses.replace(order.job, notebook=notebook, cwd=cwd), copies)
        renamed |= {str(self._sweep): str(order.job.output.parent)}
        self._name = job.name
        self._sender = Sender(self._sweep, [job.output.name, job.log.name, "runs"], renamed)
        job.write(self._file)
        self._start(job, order.threads)

    def look(self, *, anew: bool = False) -> tuple[Look, Ended | None]:
        """What the trial wrote since the last look (`anew`: all of it); and how it ended, once all of that was told."""
        if anew:
            self._sender.forget()
        assert self._process is not None, "it has not begun"
        code = self._process.poll()
        look = self._sender.look(final=code is not None)
        if code is None and not look.pieces:
            time.sleep(LOOK_SECONDS)
        if code is None or look.more:
            return look, None
        status = 128 - code if code > 128 else code  # a shell tells of a signal so
        ended = Ended.read(result_file(self._file), self._name, code=status)
        return look, dataclasses.replace(ended, error=self._sender.told(ended.error) if ended.error else None)

    def wish(self, run: str, wish: Wish) -> None:
        """Tell the run of this id."""
        if (self._sweep / "runs" / run).is_dir():
            leave_wish(self._sweep / "runs" / run, wish)

    def kill(self) -> None:
        """End the trial with all its processes; `look` tells what it wrote."""
        if self._process is not None:
            kill_family(self._process.pid)

    def close(self) -> None:
        """Kill what still runs, and clear it away."""
        self.kill()
        self._lock.release()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _copy(self, number: int, text: str, files: Mapping[str, Sequence[ObjectRef]]) -> Path:
        """Write down a file or a folder that was shipped."""
        import ray

        copy = self._folder / "inputs" / str(number) / Path(text).name
        for relative, chunks in files.items():
            file = copy / relative if relative else copy
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as opened:
                for chunk in chunks:
                    opened.write(ray.get(chunk))
        return copy

    def _here(self, job: Job, copies: Mapping[str, str]) -> Job:
        """The job with the paths of this machine."""
        folder = job.output.parent
        inside = {text: str(self._sweep / Path(text).relative_to(folder))
                  for text in (*job.environment.values(), *filter(_is_text, job.parameters.values()))
                  if Path(text).is_absolute() and Path(text).is_relative_to(folder)}  # fmt: skip
        return dataclasses.replace(
            job,
            output=self._sweep / job.output.name,
            log=self._sweep / job.log.name,
            parameters=with_paths(job, {**copies, **inside}),
            environment={name: inside.get(text, text) for name, text in job.environment.items()},
        )

    def _start(self, job: Job, threads: int) -> None:
        inherited = {name: value for name, value in os.environ.items() if name not in FOREIGN}
        with job.log.open("wb") as log:
            log.write(f"on {socket.gethostname()}, in Ray's process {os.getpid()}\n".encode())
            log.flush()
            self._process = subprocess.Popen(  # noqa: S603 - this Python, and a file of ours
                [*SHELL, sys.executable, "-P", "-m", "nbtune.sweep.worker", str(self._file)],
                stdin=subprocess.PIPE,  # closes with this process
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=job.cwd,
                env={**inherited, "OMP_NUM_THREADS": str(threads), "NBTUNE_MLFLOW_LATER": "1", **job.environment},
                start_new_session=True,
            )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _clear_away() -> None:
    """Remove what trials left behind that were killed with their actors."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError, Timeout):
            if time.time() - folder.stat().st_mtime > FORGOTTEN_SECONDS and folder.stat().st_uid == os.getuid():
                with FileLock(folder / ".lock").acquire(timeout=0):
                    shutil.rmtree(folder, ignore_errors=True)
