"""The trials of a sweep that share a base model, trained in one process: the notebook that does it, and what it calls.

    write_group(folder, "group-001", notebook, runs_dir, trials)    # -> a notebook to execute, as any job
    train_group("group-001.trials.json")                            # what its one cell calls

What a trial trains is what its notebook asks for: each is executed here as far as its `nbtune.train(spec)`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from nbtune import _files
from nbtune.errors import SweepError
from nbtune.spec import RunSpec
from nbtune.together import create_together, go_on_together, groups
from nbtune.train.handover import Asked, asking, hand_over


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A trial of a group."""

    trial: int
    parameters: Mapping[str, Any]  # of its notebook
    run_id: str  # of the run that is to be made


def write_group(folder: Path, name: str, notebook: Path, runs_dir: Path, trials: Sequence[Wanted]) -> Path:
    """Write the order for a group and the notebook that carries it out; returns the notebook."""
    import nbformat

    order = folder / f"{name}.trials.json"
    values = {"notebook": str(notebook), "runs_dir": str(runs_dir), "trials": [dataclasses.asdict(t) for t in trials]}
    _files.write_text(order, json.dumps(values, indent=2) + "\n")
    numbers = ", ".join(str(wanted.trial) for wanted in trials)
    text = f"# Trials {numbers}\n\nTrained together, on one base model. Each has a report of its own."
    code = f"from nbtune.sweep.group import train_group\n\ntrain_group({str(order)!r})"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell(code)])
    path = folder / f"{name}.ipynb"
    _files.write_text(path, nbformat.writes(book))
    return path


def train_group(order: str | Path) -> None:
    """Train the trials of an order together and wait for all; what fails alone is told by its run.

    Trials that turn out not to share a base with the first are left out, and so get no run. Raises NbtuneError where
    no two can be trained together.
    """
    values = json.loads(Path(order).read_text(encoding="utf-8"))
    trials = [Wanted(**wanted) for wanted in values["trials"]]
    notebook, runs_dir = Path(values["notebook"]), Path(values["runs_dir"])
    asked = [(wanted, spec) for wanted in trials if (spec := asked_by(notebook, wanted.parameters)) is not None]
    largest = max(groups([spec for _, spec in asked]), key=len, default=[])
    if len(largest) < 2:
        raise SweepError("These trials are trained one by one", "No two of them can share a base model.")
    chosen = [asked[number] for number in largest]
    specs, ids = [spec for _, spec in chosen], [wanted.run_id for wanted, _ in chosen]
    runs = create_together(specs, runs_dir=runs_dir, run_ids=ids)
    for run, spec in zip(runs, specs, strict=True):
        hand_over(run.path, spec)
    go_on_together(runs)
    for (wanted, _), run in zip(chosen, runs, strict=True):
        try:
            run.wait()
        except Exception as error:  # noqa: BLE001 - its run tells, and its own notebook will raise it
            print(f"trial {wanted.trial}: {str(error).splitlines()[0]}")  # noqa: T201
        else:
            print(f"trial {wanted.trial}: {run}")  # noqa: T201


def asked_by(notebook: Path, parameters: Mapping[str, Any]) -> RunSpec | None:
    """The spec that a notebook with these parameters gives to `nbtune.train`; None where it never comes so far."""
    from IPython.core.inputtransformer2 import TransformerManager
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    loaded = load_notebook_node(str(notebook))
    book = parameterize_notebook(loaded, dict(parameters), kernel_name="python3", language="python")
    names: dict[str, Any] = {"__name__": "__main__"}
    transform = TransformerManager().transform_cell
    try:
        with asking(), redirect_stdout(StringIO()):
            for number, cell in enumerate(cell for cell in book.cells if cell.cell_type == "code"):
                _execute(transform(cell.source), f"{notebook.name}, cell {number}", names)
    except Asked as asked:
        return asked.spec
    except Exception as error:  # noqa: BLE001 - its own execution will show it
        print(f"{notebook.name} is executed alone: {type(error).__name__}: {error}")  # noqa: T201
    return None


def _execute(source: str, where: str, names: dict[str, Any]) -> None:
    """Execute a cell, one with `await` as far as it waits for something. Raises SweepError there."""
    code = compile(source, where, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    cell = eval(code, names)  # noqa: S307 - the notebook that the sweep is there to execute
    if not inspect.iscoroutine(cell):
        return
    try:
        cell.send(None)
    except StopIteration:
        return
    finally:
        cell.close()
    raise SweepError("It awaits something before it trains")
