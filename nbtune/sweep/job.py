"""What one trial is to a machine: a notebook to execute in a process of its own, and how that process ended.

Every executor takes a `Job` and gives back an `Ended`; the process is the same everywhere:

    python -m nbtune.sweep.worker JOB.json

It executes the notebook, writes how that went beside JOB.json, and ends with all its children when its standard input
closes: a job never outlives the process that started it.
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

    def write(self, file: Path) -> None:
        values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self).items()}
        _files.write_text(file, json.dumps(values, indent=2) + "\n")

    @classmethod
    def read(cls, file: Path) -> Job:
        values = json.loads(file.read_text(encoding="utf-8"))
        return cls(**{**values, **{name: Path(values[name]) for name in ("notebook", "output", "cwd", "log")}})


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a job's process ended."""

    name: str
    outcome: Outcome
    error: str | None = None

    @classmethod
    def read(cls, file: Path, name: str, *, code: int | None) -> Ended:
        """What the worker wrote; a process that was killed wrote nothing, and only its exit code tells."""
        if file.exists():
            return cls(name, **json.loads(file.read_text(encoding="utf-8")))
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit status {code}"
        return cls(name, "died", f"Its process ended {how}: killed, or out of memory.")

    def write(self, file: Path) -> None:
        _files.write_text(file, json.dumps({"outcome": self.outcome, "error": self.error}) + "\n")


def result_file(job_file: Path) -> Path:
    return job_file.with_suffix(".ended.json")


class Executor(Protocol):
    """Runs jobs, some at a time."""

    @property
    def free(self) -> int:
        """How many more jobs it can start now."""
        ...

    def start(self, job: Job) -> Mapping[str, Any]:
        """Start a job and return what the ledger should remember of it. Needs a free place."""
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
