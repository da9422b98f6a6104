"""What a comparison is made of: runs, adapter folders and the base, resolved to names, folders and one base model."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from nbtune.errors import AdapterError, NbtuneError, RunError
from nbtune.models import resolve
from nbtune.spec import ModelSpec, RunSpec, method_label

BASE = "base"


@runtime_checkable
class RunLike(Protocol):
    """A run, live or finished: `path` is its folder, which holds `spec.yaml` and `adapter/` or `model/`."""

    @property
    def id(self) -> str: ...
    @property
    def path(self) -> Path: ...


ColumnLike = str | Path | RunLike


@dataclasses.dataclass(frozen=True)
class Column:
    """One column beside the base."""

    name: str
    folder: Path  # of the adapter, or of the whole model where `whole`
    label: str  # "LoRA r16"
    model: ModelSpec
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Lineup:
    """The base model and the columns that are compared with it."""

    model: ModelSpec
    columns: tuple[Column, ...]

    @property
    def adapters(self) -> dict[str, Path]:
        return {column.name: column.folder for column in self.columns if not column.whole}

    @property
    def models(self) -> dict[str, Path]:
        return {column.name: column.folder for column in self.columns if column.whole}

    @property
    def labels(self) -> dict[str, str]:
        return {BASE: "as it was", **{column.name: column.label for column in self.columns}}


def line_up(columns: Iterable[ColumnLike], runs_dir: str | Path | None = None) -> Lineup:
    """Resolve what the user named: `"base"`, runs, run ids under `runs_dir`, adapter folders.

    Raises NbtuneError where one does not exist, holds nothing to compare, or was made on another base model.
    """
    folder = Path(runs_dir or os.environ.get("NBTUNE_RUNS") or "runs")
    found: list[Column] = []
    for item in columns:
        if item == BASE:
            continue
        column = _column(item, folder)
        if all(column.folder.resolve() != other.folder.resolve() for other in found):
            found.append(column)
    found = _unique_names(found)
    models = list(dict.fromkeys(column.model for column in found)) or [ModelSpec()]
    if len({model.name for model in models}) > 1 and len({resolve(model).origin for model in models}) > 1:
        raise NbtuneError(
            "These columns have different base models",
            "; ".join(f"{column.name}: {column.model.name}" for column in found),
            "Compare adapters of one base model at a time.",
        )
    return Lineup(models[0], tuple(found))


def _column(item: ColumnLike, runs_dir: Path) -> Column:
    if isinstance(item, RunLike):
        return _of_run(item.id, Path(item.path))
    path = Path(item)
    if not path.exists() and (runs_dir / path).exists():
        path = runs_dir / path
    if (path / "adapter_config.json").is_file():
        return _of_adapter(path)
    if (path / "spec.yaml").is_file():
        return _of_run(path.resolve().name, path)
    known = sorted(run.parent.name for run in runs_dir.glob("*/spec.yaml"))
    raise RunError(
        f"There is no run and no adapter {str(item)!r}",
        f"Neither {path} nor {runs_dir / str(item)} holds an adapter_config.json or a spec.yaml.",
        f"Runs in {runs_dir}: {', '.join(known) if known else 'none'}.",
    )


def _of_run(name: str, path: Path) -> Column:
    try:
        spec = RunSpec.from_yaml(path / "spec.yaml")
    except FileNotFoundError as error:
        raise RunError(
            f"{name} is not a run", f"{path / 'spec.yaml'} does not exist.", "Name a run's folder."
        ) from error
    if spec.method == "full":
        if not (path / "model" / "config.json").is_file():
            raise _unfinished(name, path / "model")
        return Column(name, path / "model", "full fine-tune", spec.model, whole=True)
    folder = path / "adapter"
    if not (folder / "adapter_config.json").is_file():
        raise _unfinished(name, folder)
    return Column(name, folder, method_label(_read(folder)), spec.model)


def _of_adapter(folder: Path) -> Column:
    """An adapter on its own, or one inside a run, whose spec then says more than the adapter does."""
    run = folder.resolve().parent
    if folder.resolve().name == "adapter" and (run / "spec.yaml").is_file():
        return _of_run(run.name, run)
    config = _read(folder)
    base = config.get("base_model_name_or_path")
    if not base:
        raise AdapterError(
            "This adapter does not say which model it belongs to",
            f"{folder / 'adapter_config.json'} has no base_model_name_or_path.",
            "Write the name of its base model there.",
        )
    model = ModelSpec(name=str(base), revision=config.get("revision"))
    return Column(folder.resolve().name, folder, method_label(config), model)


def _unfinished(name: str, folder: Path) -> RunError:
    return RunError(
        f"{name} has no weights to compare yet", f"{folder} does not exist.", "Wait for the run to end, or resume it."
    )


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError("The adapter's config cannot be read", f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError("The adapter's config cannot be read", f"{path} is not a JSON object.")
    return config


def _unique_names(columns: Sequence[Column]) -> list[Column]:
    """Folders of one name in two places get a number; so does a folder that is called `base`."""
    names = {BASE}
    unique: list[Column] = []
    for column in columns:
        name, number = column.name, 2
        while name in names:
            name, number = f"{column.name} ({number})", number + 1
        names.add(name)
        unique.append(dataclasses.replace(column, name=name))
    return unique
