"""The notebook of a sweep: which parameters it takes, and the run that they mean, without executing it.

notebook = SweepNotebook(Path("train.ipynb"))
parameters = notebook.parameters({"r": 8, "warmup_ratio": 0.1})   # {"r": 8, "settings": {"warmup_ratio": 0.1}}
notebook.spec(parameters)                                         # RunSpec, or None for a notebook of another kind

Papermill takes any name and runs any notebook; what is refused here never starts.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbtune.echo import short_names
from nbtune.notebook import NotebookError, check_parameters, parameters
from nbtune.spec import RunSpec, settings

REST = "settings"  # the parameter that takes every setting that is no parameter of its own
OWN = ("runs_dir", "run_id")  # what a sweep chooses itself


class SweepNotebook:
    """A notebook with one cell of parameters.

    A name of the space is a parameter of it, by its own name or by that of a setting (`training.learning_rate`,
    `data.seed` for `data_seed`); any other setting goes into its parameter `settings`, if it has one.
    Raises NotebookError where there is not exactly one such cell, or where nothing in it could train.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.defaults = parameters(path)
        _require_training(path)

    @property
    def digest(self) -> str:
        """A name for what the notebook does: its cells without outputs."""
        cells = [(cell.cell_type, cell.source) for cell in _cells(self.path)]
        return hashlib.sha256(json.dumps(cells).encode()).hexdigest()[:12]

    @property
    def is_of_a_run(self) -> bool:
        """Whether its parameters are those of a run, as in `notebooks/train.ipynb` and what the wizard writes."""
        return {"model", "data"} <= set(self.defaults)

    def parameters(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What papermill is to pass for these values. Raises NotebookError for an unknown name or a wrong type."""
        passed: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        for name, value in values.items():
            if name in OWN:
                raise NotebookError(f"{name} is the sweep's own", "It keeps the runs together.", "Leave it out.")
            if (parameter := self.parameter(name)) is not None:
                passed[parameter] = value
            else:
                rest[name] = value
        if rest:
            passed[REST] = {**self.defaults[REST], **passed.get(REST, {}), **rest}
        check_parameters(self.path, passed, self.defaults)
        return passed

    def parameter(self, name: str) -> str | None:
        """The notebook's parameter of this name; None for a setting that goes into `settings`.

        Raises NotebookError where the notebook takes no such thing.
        """
        short = short_names(RunSpec()).get(name, name)
        found = next((known for known in (name, short, short.replace(".", "_")) if known in self.defaults), None)
        if found is None and not (self.is_of_a_run and isinstance(self.defaults.get(REST), dict)):
            check_parameters(self.path, {name: None}, self.defaults)  # raises, and names what is near
        return found

    def spec(self, passed: Mapping[str, Any]) -> RunSpec | None:
        """The run that these parameters mean; None where the notebook's parameters are not those of a run.

        Settings that the notebook's code chooses are not seen. A parameter of the adapter that this method does not
        have, or has switched off (the rank of OFT), is left out, as notebooks of nbtune do. Raises SpecError for values
        that no run can have.
        """
        if not self.is_of_a_run:
            return None
        values = {**self.defaults, **passed}
        method = values.get("method") or "lora"
        spec = RunSpec.from_dict({"model": {"name": values["model"]}, "data": values["data"], "method": method})
        paths = {short.replace(".", "_"): path for path, short in short_names(spec).items()}
        switched_off = {setting.path for setting in settings(spec.method) if not setting.default}
        usual = method == self.defaults.get("method", method)
        chosen: dict[str, Any] = {}
        for name, value in values.items():
            path = paths.get(name)
            if path is None or path in ("model.name", "data.source") or value is None:
                continue
            if usual or not (path.startswith("method.") and path in switched_off):
                chosen[path] = value
        return spec.updated(**chosen, **(values.get(REST) or {}))


def same_run(spec: RunSpec) -> str:
    """Equal for two specs that train the same."""
    return json.dumps(spec.to_dict(), sort_keys=True)


def _cells(path: Path) -> list[Any]:
    import nbformat

    return nbformat.read(path, as_version=4).cells


def _require_training(path: Path) -> None:
    """Raise NotebookError where the notebook imports nothing that could train: only Python's own library.

    Whether one that imports more does train is known when its first trial has ended.
    """
    for cell in _cells(path):
        if cell.cell_type != "code":
            continue
        try:
            tree = ast.parse(cell.source, feature_version=sys.version_info[:2])
        except SyntaxError:
            return  # magics and shell lines may do anything
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] not in sys.stdlib_module_names for name in names):
                return
    raise NotebookError(
        f"{path.name} never trains", "It imports no package that could.", "Let it call nbtune.train(...).wait()."
    )
