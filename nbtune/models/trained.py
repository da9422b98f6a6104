"""What training left behind: a run, a run id or an adapter's folder, resolved to its weights and its base model."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from nbtune.errors import AdapterError, RunError
from nbtune.spec import ModelSpec, RunSpec, method_label


def default_runs_dir() -> Path:
    """The folder of runs: `NBTUNE_RUNS`, else `runs` in the working folder."""
    return Path(os.environ.get("NBTUNE_RUNS") or "runs")


@runtime_checkable
class RunLike(Protocol):
    """A run, live or finished: `path` is its folder, which holds `spec.yaml` and `adapter/` or `model/`."""

    @property
    def id(self) -> str: ...
    @property
    def path(self) -> Path: ...


TrainedLike = str | Path | RunLike


@dataclasses.dataclass(frozen=True)
class Trained:
    """An adapter, or a whole model that was trained, and the model that it was made from."""

    name: str
    folder: Path  # of the adapter, or of the whole model where `whole`
    label: str  # "LoRA r16"
    model: ModelSpec
    whole: bool = False


def find_trained(item: TrainedLike, runs_dir: Path) -> Trained:
    """Resolve a run, a run id under `runs_dir`, the folder of a run or of an adapter.

    Raises RunError where there is none or it has no weights yet, AdapterError where an adapter's config is damaged.
    """
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


def _of_run(name: str, path: Path) -> Trained:
    try:
        spec = RunSpec.from_yaml(path / "spec.yaml")
    except FileNotFoundError as error:
        raise RunError(
            f"{name} is not a run", f"{path / 'spec.yaml'} does not exist.", "Name a run's folder."
        ) from error
    if spec.method == "full":
        if not (path / "model" / "config.json").is_file():
            raise _unfinished(name, path / "model")
        return Trained(name, path / "model", "full fine-tune", spec.model, whole=True)
    folder = path / "adapter"
    if not (folder / "adapter_config.json").is_file():
        raise _unfinished(name, folder)
    return Trained(name, folder, method_label(_read(folder)), spec.model)


def _of_adapter(folder: Path) -> Trained:
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
    return Trained(folder.resolve().name, folder, method_label(config), model)


def _unfinished(name: str, folder: Path) -> RunError:
    return RunError(f"{name} has no weights yet", f"{folder} does not exist.", "Wait for the run to end, or resume it.")


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError("The adapter's config cannot be read", f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError("The adapter's config cannot be read", f"{path} is not a JSON object.")
    return config
