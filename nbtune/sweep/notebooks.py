"""Notebooks as tests: each executed once, in a process of its own, with few steps.

    for result in run_notebooks(find_notebooks([Path("notebooks")]), {"max_steps": 2}, out):
        print(result.path, result.outcome)

Their runs lie in one folder, so that a notebook which compares runs finds those of the notebooks before it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nbtune.echo import short_names
from nbtune.errors import NbtuneError
from nbtune.notebook import NotebookError, check_parameters, parameters
from nbtune.spec import RunSpec
from nbtune.sweep.job import Ended, Job, Outcome
from nbtune.sweep.local import LocalExecutor
from nbtune.sweep.notebook import REST

INTERVAL = 0.1  # seconds between two looks at a notebook


@dataclasses.dataclass(frozen=True)
class Result:
    """How a notebook did."""

    path: Path
    outcome: Outcome
    seconds: float
    error: str | None
    output: Path  # the executed notebook; not there where it was refused


def find_notebooks(paths: Sequence[Path]) -> list[Path]:
    """The notebooks that are named, and those in the folders that are, in order. Raises NotebookError for none."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(file for file in path.rglob("*.ipynb") if not any(p.startswith(".") for p in file.parts))
        elif path.is_file():
            found.append(path)
        else:
            raise NotebookError(f"There is no notebook {path}")
    if not found:
        raise NotebookError("There are no notebooks", f"None in {', '.join(map(str, paths))}.")
    return list(dict.fromkeys(found))


def run_notebooks(
    notebooks: Iterable[Path], values: Mapping[str, Any], out: Path, *, timeout: float | None = None
) -> Iterator[Result]:
    """Execute notebooks one after the other, give each the `values` that it knows, and keep what they wrote in `out`.

    A notebook that takes more than `timeout` seconds is ended, and has failed.
    """
    out = out.resolve()
    executor = LocalExecutor(1, out / ".jobs")
    try:
        for number, notebook in enumerate(notebooks, 1):
            output = out / f"{number:02d}-{notebook.name}"
            began = time.monotonic()
            try:
                ended = _execute(executor, notebook, output, known_parameters(notebook, values), timeout)
            except NbtuneError as error:
                ended = Ended(output.stem, "failed", str(error))
            yield Result(notebook, ended.outcome, time.monotonic() - began, ended.error, output)
    finally:
        executor.close()


def known_parameters(notebook: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Of the values those that the notebook takes, by its own parameters or in its `settings`.

    A notebook without a cell of parameters takes none. Raises NotebookError for a value of the wrong type, and where
    there is more than one such cell.
    """
    import nbformat

    cells = nbformat.read(notebook, as_version=4).cells
    if not any("parameters" in cell.metadata.get("tags", []) for cell in cells):
        return {}
    defaults = parameters(notebook)
    passed = {name: value for name, value in values.items() if name in defaults}
    if {"model", "data"} <= set(defaults) and isinstance(defaults.get(REST), dict):
        of_runs = set(short_names(RunSpec()).values())
        rest = {name: value for name, value in values.items() if name in of_runs and name not in defaults}
        passed |= {REST: {**defaults[REST], **rest}} if rest else {}
    check_parameters(notebook, passed, defaults)
    return passed


def _execute(
    executor: LocalExecutor, notebook: Path, output: Path, parameters: dict[str, Any], timeout: float | None
) -> Ended:
    began = time.monotonic()
    executor.start(
        Job(
            name=output.stem,
            notebook=notebook.resolve(),
            output=output,
            parameters=parameters,
            cwd=output.parent,
            environment={"NBTUNE_RUNS": str(output.parent / "runs")},
            log=output.with_suffix(".log"),
        )
    )
    while not (ended := executor.ended()):
        if timeout is not None and time.monotonic() - began > timeout:
            executor.kill(output.stem)
            return dataclasses.replace(executor.ended()[0], error=f"It took more than {timeout:g} s.")
        time.sleep(INTERVAL)
    return ended[0]
