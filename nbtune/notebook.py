"""Notebooks as functions: find the ones that come with nbtune, read their parameters, execute them with papermill.

Papermill takes any parameter: an unknown name is injected all the same, and without a cell tagged `parameters` the
notebook's own defaults overwrite what was passed. `execute` refuses both before anything runs.
"""

from __future__ import annotations

import ast
import difflib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nbtune.errors import NbtuneError

_CHECKOUT = Path(__file__).parent.parent / "notebooks"
_INSTALLED = Path(__file__).parent / "_notebooks"
_PLAIN = (int, float, str, bool, list, dict, type(None))


class NotebookError(NbtuneError, ValueError):
    """A notebook cannot be executed with these parameters, or failed."""


class KernelDiedError(NotebookError):
    """The kernel of a notebook ended before its last cell: it was killed, or ran out of memory."""


def packaged(name: str) -> Path:
    """The path of a notebook that comes with nbtune: `wizard.ipynb`, `train.ipynb`, `compare.ipynb`."""
    folder = _CHECKOUT if _CHECKOUT.is_dir() else _INSTALLED
    path = folder / name
    if not path.is_file():
        raise NotebookError(
            f"nbtune has no notebook {name!r}", "", f"It has {sorted(p.name for p in folder.glob('*.ipynb'))}."
        )
    return path


def copy_packaged(name: str, folder: Path) -> Path:
    """Put a copy of a packaged notebook into `folder`, unless one of that name is there already."""
    target = folder / name
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(packaged(name), target)
    return target


def parameters(path: Path) -> dict[str, Any]:
    """The parameters of the notebook at `path` and their defaults, None where one has no plain value.

    Raises NotebookError where there is not exactly one cell tagged `parameters`.
    """
    import nbformat

    if not path.is_file():
        raise NotebookError(f"There is no notebook {path}")
    cells = nbformat.read(path, as_version=4).cells
    tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise NotebookError(
            f"{path.name} has {len(tagged)} cells tagged 'parameters'",
            "What is passed to it would be lost or overwritten.",
            "Tag exactly one cell with 'parameters' (in JupyterLab: the gear at the right, Cell Tags).",
        )
    found: dict[str, Any] = {}
    for statement in ast.parse(tagged[0].source).body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            found.update(dict.fromkeys(names, _literal(statement.value)))
    return found


def _literal(expression: ast.expr) -> Any:
    """The plain value that an expression spells out; None where it has to be computed."""
    try:
        return ast.literal_eval(expression)
    except ValueError:
        return None


def check_parameters(path: Path, values: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> None:
    """Raise NotebookError where the notebook at `path` does not take these `values`.

    `known` is what `parameters` says of it; None asks.
    """
    known = parameters(path) if known is None else known
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or sorted(known)
            raise NotebookError(f"{path.name} has no parameter {name!r}", "", f"It takes {', '.join(near)}.")
        if not isinstance(value, _PLAIN):
            raise NotebookError(f"{name} is a {type(value).__name__}", "Papermill passes plain values only.")
        default = known[name]
        numbers = isinstance(value, int | float) and isinstance(default, int | float)
        same = type(value) is type(default) or (numbers and isinstance(value, bool) == isinstance(default, bool))
        if default is not None and value is not None and not same:
            raise NotebookError(
                f"{name} is {value!r}, of type {type(value).__name__}",
                f"{path.name} has {default!r} there.",
                f"Pass a {type(default).__name__}.",
            )


def execute(path: Path, output: Path, values: Mapping[str, Any] | None = None, *, cwd: Path | None = None) -> Path:
    """Execute the notebook at `path` with the parameters `values` and keep the result in `output`.

    Raises NotebookError before anything runs where the parameters do not fit or `output` exists, and after it where a
    cell failed or the kernel died; the notebook with the error is in `output`.
    """
    values = dict(values or {})
    if values:
        check_parameters(path, values)
    elif not path.is_file():
        raise NotebookError(f"There is no notebook {path}")
    if output.exists():
        raise NotebookError(f"{output} exists already", "", "Choose another name; nothing is overwritten.")
    output.parent.mkdir(parents=True, exist_ok=True)

    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from traitlets.config import Config

    try:
        with _private_transport() as transport:
            papermill.execute_notebook(
                str(path),
                str(output),
                parameters=values,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                config=Config({"KernelManager": transport}),
                cwd=os.fspath(cwd) if cwd is not None else None,
            )
    except papermill.PapermillExecutionError as error:
        raise NotebookError(
            f"{path.name} failed in cell {error.exec_count}", f"{error.ename}: {error.evalue}", f"See {output}."
        ) from error
    except (DeadKernelError, CellTimeoutError) as error:
        raise KernelDiedError(
            f"The kernel of {path.name} died", str(error), f"It may have run out of memory. See {output}."
        ) from error
    return output


@contextmanager
def _private_transport() -> Iterator[dict[str, str]]:
    """How papermill and its kernel talk: over TCP every user of the machine could read it.

    Jupyter's own choice of sockets is `kernel-ipc-1` in the working folder, which two notebooks there would share.
    """
    if os.name != "posix":
        yield {"transport": "tcp"}
        return
    with tempfile.TemporaryDirectory(prefix="nbtune-", ignore_cleanup_errors=True) as folder:
        yield {"transport": "ipc", "ip": f"{folder}/kernel"}
