"""What a comparison is made of: runs, adapter folders and the base, resolved to names, folders and one base model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from nbtune.errors import NbtuneError
from nbtune.models import resolve
from nbtune.models.trained import Trained as Column
from nbtune.models.trained import TrainedLike as ColumnLike
from nbtune.models.trained import find_trained
from nbtune.spec import ModelSpec

BASE = "base"


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
        column = find_trained(item, folder)
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
