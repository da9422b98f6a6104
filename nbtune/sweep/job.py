"""What one trial is to a machine: a notebook to execute in a process of its own, and how that process ended.

Every executor takes a `Job` and gives back an `Ended`; the process is the same everywhere:

    python -m nbtune.sweep.worker JOB.json

It executes the notebook, writes how that went beside JOB.json, and ends with all its children when its standard input
closes: a job never outlives the process that started it. With `--alone` before JOB.json it does not look there: some
other engine started it, and ends it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from nbtune import _files

Outcome = Literal["finished", "failed", "died"]


@dataclasses.dataclass(frozen=True)
class Job:
    """A notebook to execute. All paths are absolute."""

    name: str  # a file name: "003"
    notebook: Path
    output: Path  # the executed notebook
    parameters: Mapping[str, Any]
    cwd: Path
    environment: Mapping[str, str]  # beside that of the executor's machine
    log: Path  # what the process writes beside the notebook
    memory_bytes: int | None = None  # that it will take, where that is known

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Job:
        return cls(**{**values, **{name: Path(values[name]) for name in ("notebook", "output", "cwd", "log")}})

    def write(self, file: Path) -> None:
        _files.write_text(file, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def read(cls, file: Path) -> Job:
        return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a job's process ended."""

    name: str
    outcome: Outcome
    error: str | None = None
    seconds: float | None = None  # that it took, where its process lived to tell

    @classmethod
    def read(cls, file: Path, name: str, *, code: int | None) -> Ended:
        """What the worker wrote; a process that was killed wrote nothing, and only its exit code tells."""
        if file.exists():
            return cls(name, **json.loads(file.read_text(encoding="utf-8")))
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit status {code}"
        return cls(name, "died", f"Its process ended {how}: killed, or out of memory.")

    def write(self, file: Path) -> None:
        _files.write_text(file, json.dumps({n: v for n, v in vars(self).items() if n != "name"}) + "\n")


def result_file(job_file: Path) -> Path:
    return job_file.with_suffix(".ended.json")


def lock_file(job_file: Path) -> Path:
    """Held by a job's process as long as it is there."""
    return job_file.with_suffix(".lock")


class Executor(Protocol):
    """Runs jobs, some at a time."""

    @property
    def free(self) -> int:
        """How many more jobs it can start now."""
        ...

    def start(self, job: Job) -> Mapping[str, Any]:
        """Start a job and return what the ledger should remember of it. Needs a free place."""
        ...

    def waits(self, name: str) -> bool:
        """Whether a job that was started has no place yet: others use the machines."""
        ...

    def ended(self) -> list[Ended]:
        """The jobs that ended since the last question."""
        ...

    def kill(self, name: str) -> None:
        """End a job at once, with every process that it started; `ended` tells of it."""
        ...

    def close(self) -> None:
        """Kill what still runs."""
        ...
