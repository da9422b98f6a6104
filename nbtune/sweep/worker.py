"""The process of a job: `python -m nbtune.sweep.worker [--alone] JOB.json`, see `nbtune.sweep.job`.

Papermill writes a notebook in place, and a kill at that moment would leave half of one; here every state of it is a
whole file.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
from pathlib import Path

from filelock import FileLock

from nbtune import _files
from nbtune._processes import end_with_parent
from nbtune.errors import NbtuneError
from nbtune.notebook import KernelDiedError, execute
from nbtune.sweep.job import Ended, Job, lock_file, result_file


class WholeFiles:
    """What papermill asks of a place to write notebooks to."""

    @staticmethod
    def read(path: str) -> str:
        return Path(path).read_text(encoding="utf-8")

    @staticmethod
    def write(text: str, path: str) -> None:
        _files.write_text(Path(path), text)

    @staticmethod
    def pretty_path(path: str) -> str:
        return path


def main() -> None:
    """Execute the job in the file that the command line names, and write how it ended."""
    *options, name = sys.argv[1:]
    file = Path(name)
    job = Job.read(file)
    os.environ.update(job.environment)
    if "--alone" not in options:
        end_with_parent()
    began = time.monotonic()
    with FileLock(lock_file(file)):
        ended = dataclasses.replace(run(job), seconds=round(time.monotonic() - began, 3))
        ended.write(result_file(file))
    sys.exit(0 if ended.outcome == "finished" else 1)


def run(job: Job) -> Ended:
    """Execute the notebook of a job in this process."""
    from papermill.iorw import papermill_io

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    papermill_io.register(str(job.output), WholeFiles)  # papermill's own list, of this process, for this one path
    try:
        execute(job.notebook, job.output, job.parameters, cwd=job.cwd)
    except KernelDiedError as error:
        mark(job.output, "The kernel died here: it was killed, or ran out of memory.")
        return Ended(job.name, "died", str(error))
    except NbtuneError as error:
        return Ended(job.name, "failed", str(error))
    except OSError as error:  # of a full disk, the last whole state of the notebook is kept
        return Ended(job.name, "failed", f"Its notebook could not be executed or written.\n{error}")
    return Ended(job.name, "finished")


def mark(notebook: Path, text: str) -> None:
    """Say on top of an executed notebook why it ends where it does, as papermill does of a cell that failed."""
    import nbformat

    if not notebook.exists():
        return
    book = nbformat.read(notebook, as_version=4)
    book.cells.insert(0, nbformat.v4.new_markdown_cell(f"**{text}**", metadata={"tags": ["nbtune-trial"]}))
    _files.write_text(notebook, nbformat.writes(book))


if __name__ == "__main__":
    main()
