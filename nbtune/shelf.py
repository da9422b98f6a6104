"""What a person does with runs that are there: names them, writes a note, compares their settings, throws them away.

    about = read_about(run.path); write_about(run.path, About(label="baseline", note="too high a learning rate"))
    difference([run, other])["training.learning_rate"]     # [0.0002, 0.001]
    bin_path = discard(run.path); restore(bin_path)

A label and a note stand in `about.json` in the run's folder, which keeps its name. What is thrown away lies in `.trash`
beside the runs until that is emptied.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from nbtune import _files
from nbtune.errors import RunError
from nbtune.spec import RunSpec

FILE = "about.json"
TRASH = ".trash"
LABEL_LENGTH = 80  # characters


@dataclasses.dataclass(frozen=True)
class About:
    """What a person says of a run."""

    label: str = ""
    note: str = ""


class HasSpec(Protocol):
    @property
    def spec(self) -> RunSpec: ...


def read_about(path: Path) -> About:
    """The label and the note of the run at `path`. Raises RunError where the file is damaged."""
    file = path / FILE
    if not file.exists():
        return About()
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return About(str(values["label"]), str(values["note"]))
    except (ValueError, KeyError, TypeError) as error:
        raise RunError("A run's label cannot be read", f"{file}: {error}", "Correct the file, or delete it.") from error


def write_about(path: Path, about: About) -> None:
    """Keep a label and a note. Raises RunError for a label that is too long to be a name."""
    label = " ".join(about.label.split())
    if len(label) > LABEL_LENGTH:
        message = f"It has {len(label)} characters; a label has at most {LABEL_LENGTH}."
        raise RunError("The label is too long", message, "Put the rest into the note.")
    kept = About(label, about.note.strip())
    _files.write_text(path / FILE, json.dumps(dataclasses.asdict(kept), indent=2, ensure_ascii=False) + "\n")


def difference(runs: Sequence[HasSpec]) -> dict[str, list[Any]]:
    """The settings in which these runs differ: path of the setting -> its value in each run.

    A setting that not all of the methods have is None where it is missing, and left out where it has its default.
    """
    flat = [_flat(run.spec) for run in runs]
    everywhere = set.intersection(*map(set, flat)) if flat else set()
    shown = [path for run, values in zip(runs, flat, strict=True) for path in values
             if path in everywhere or path in _chosen(run.spec)]  # fmt: skip
    values = {path: [settings.get(path) for settings in flat] for path in dict.fromkeys(shown)}
    return {path: found for path, found in values.items() if any(value != found[0] for value in found)}


def discard(path: Path) -> Path:
    """Move the run's folder into the trash beside it; returns where it lies now."""
    trash = path.parent / TRASH
    trash.mkdir(exist_ok=True)
    target, count = trash / path.name, 1
    while target.exists():
        count += 1
        target = trash / f"{path.name}.{count}"
    path.rename(target)
    return target


def restore(thrown: Path) -> Path:
    """Move a run's folder back from the trash; returns where it lies now. Raises RunError where one is there."""
    target = thrown.parent.parent / thrown.name
    if target.exists():
        raise RunError(f"There is a run {thrown.name} already", str(target), "Rename that folder first.")
    thrown.rename(target)
    return target


def in_trash(runs_dir: Path) -> list[Path]:
    """The folders of the runs that were thrown away, oldest id first."""
    return sorted(path.parent for path in (runs_dir / TRASH).glob("*/spec.yaml"))


def empty_trash(runs_dir: Path) -> int:
    """Delete for good what was thrown away; returns how many runs that were."""
    thrown = in_trash(runs_dir)
    for path in thrown:
        shutil.rmtree(path)
    return len(thrown)


def _flat(spec: RunSpec) -> dict[str, Any]:
    """Every setting by its path."""
    parts = spec.to_dict().items()
    nested = [(part, values) if isinstance(values, dict) else (part, {"peft_type": values}) for part, values in parts]
    return {f"{part}.{name}": value for part, values in nested for name, value in values.items()}


def _chosen(spec: RunSpec) -> set[str]:
    """The settings of the method that are not its defaults."""
    if spec.method == "full":
        return set()
    defaults = type(spec.method)().to_dict()
    return {f"method.{name}" for name, value in spec.method.to_dict().items() if value != defaults[name]}
