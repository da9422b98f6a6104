"""What a trial needs from the sweep's machine: its notebook, and the files and folders that its parameters name.

A machine that sees the same file, by a shared disk or because it is the same machine, reads it where it is; to others
it is shipped, and the trial is given the path of the copy.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nbtune.notebook import parameters
from nbtune.sweep.job import Job

Facts = tuple[int, int, int]  # size in bytes, time of the last change in ns, inode


@dataclasses.dataclass(frozen=True)
class Input:
    """A file or a folder that a parameter names."""

    text: str  # as the parameter has it
    path: str  # absolute
    files: Mapping[str, Facts]  # by their path in the folder; a file is its own only one, named ""

    def is_here(self) -> bool:
        """Whether this machine sees the same, unchanged."""
        return _facts(Path(self.path)) == self.files

    def file(self, relative: str) -> Path:
        return Path(self.path) / relative if relative else Path(self.path)


def settings_of(job: Job) -> dict[str, Any]:
    """The notebook's own parameters and those of the job: all that a trial is told."""
    return {**parameters(job.notebook), **job.parameters}


def inputs_of(job: Job) -> list[Input]:
    """What the parameters of a job name that exists. Never the folder that it runs in, or one above."""
    found: dict[str, Input] = {}
    kept_out = (job.cwd, job.output.parent)
    for text in _texts(settings_of(job)):
        path = job.cwd / text
        if not text or text in found or len(text) > 4096 or "\0" in text or not path.exists():
            continue
        if not any(folder.resolve().is_relative_to(path.resolve()) for folder in kept_out):
            found[text] = Input(text, str(path), _facts(path))
    return list(found.values())


def with_paths(job: Job, copies: Mapping[str, str]) -> dict[str, Any]:
    """The parameters of a job whose texts that are keys of `copies` became their values."""
    told = settings_of(job)
    moved = {name: _replaced(value, copies) for name, value in told.items()}
    return {name: value for name, value in moved.items() if name in job.parameters or value != told[name]}


def _facts(path: Path) -> dict[str, Facts]:
    if path.is_file():
        return {"": _of(path)}
    facts: dict[str, Facts] = {}
    for folder, _, names in os.walk(path):
        for file in (Path(folder) / name for name in names):
            if file.is_file():  # a hub model is a folder of links to files
                facts[file.relative_to(path).as_posix()] = _of(file)
    return facts


def _of(file: Path) -> Facts:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _replaced(value: Any, by: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return by.get(value, value)
    if isinstance(value, Mapping):
        return {name: _replaced(item, by) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, by) for item in value]
    return value
