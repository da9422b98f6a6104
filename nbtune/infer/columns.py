"""What a comparison is made of: runs, adapter folders, models, resolved to names, folders and their base models."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from nbtune.errors import NbtuneError
from nbtune.models import resolve
from nbtune.models.trained import Trained as Column
from nbtune.models.trained import TrainedLike, default_runs_dir, find_trained
from nbtune.spec import ModelSpec

BASE = "base"
AS_IT_WAS = "as it was"
ColumnLike = TrainedLike | ModelSpec


@dataclasses.dataclass(frozen=True)
class Family:
    """A model and the adapters of it that are compared."""

    name: str  # of the column that is the model itself
    model: ModelSpec
    adapters: Mapping[str, str | Path]  # by column: the folder


@dataclasses.dataclass(frozen=True)
class Lineup:
    """The base model and the columns that are compared with it."""

    model: ModelSpec
    columns: tuple[Column, ...]  # but those that are a base as it was
    others: tuple[Family, ...] = ()  # other bases with those of the columns that are made of them

    @property
    def adapters(self) -> dict[str, Path]:
        """Of the base."""
        return {column.name: column.folder for column in self._own if not column.whole}

    @property
    def models(self) -> dict[str, Path]:
        """Full fine-tunes of the base."""
        return {column.name: column.folder for column in self._own if column.whole}

    @property
    def labels(self) -> dict[str, str]:
        """What each column is, for people; in no particular order."""
        bases = dict.fromkeys([BASE, *(family.name for family in self.others)], AS_IT_WAS)
        return {**bases, **{column.name: column.label for column in self.columns}}

    @property
    def _own(self) -> list[Column]:
        elsewhere = {name for family in self.others for name in (family.name, *family.adapters)}
        return [column for column in self.columns if column.name not in elsewhere]

    def require_one_base(self) -> None:
        """Raise NbtuneError where columns have different base models."""
        if self.others:
            bases = [(BASE, self.model), *((family.name, family.model) for family in self.others)]
            raise NbtuneError(
                "These columns have different base models",
                "; ".join(f"{name}: {model.name}" for name, model in bases),
                "Name those of one base model.",
            )


def line_up(columns: Iterable[ColumnLike], runs_dir: str | Path | None = None) -> Lineup:
    """Resolve what the user named: `"base"`, runs, run ids under `runs_dir`, adapter folders, models (ModelSpec).

    The base is that of the first column. Each other base that a column was made on is a column too, `base (its name)`.
    Raises NbtuneError where one does not exist, or holds nothing to compare.
    """
    folder = Path(runs_dir or default_runs_dir())
    found: list[Column] = []
    models: list[ModelSpec] = []  # of every column, and those that are named themselves
    for item in columns:
        if item == BASE:
            continue
        if isinstance(item, ModelSpec):
            models.append(item)
            continue
        column = find_trained(item, folder)
        models.append(column.model)
        if all(column.folder.resolve() != other.folder.resolve() for other in found):
            found.append(column)
    origins = _origins(models)
    first: dict[str, ModelSpec] = {}
    for model in models:
        first.setdefault(origins[model.name], model)
    bases = list(first.values()) or [ModelSpec()]
    found = _unique_names(found)
    return Lineup(bases[0], tuple(found), _others(bases[1:], found, origins))


def _others(bases: Sequence[ModelSpec], columns: Sequence[Column], origins: Mapping[str, str]) -> tuple[Family, ...]:
    """The other bases, each with its adapters, and the full fine-tunes of them."""
    taken = {BASE, *(column.name for column in columns)}
    families: list[Family] = []
    for model in bases:
        own = [column for column in columns if origins[column.model.name] == origins[model.name]]
        name = _free(f"{BASE} ({Path(origins[model.name]).name})", taken)
        families.append(Family(name, model, {column.name: column.folder for column in own if not column.whole}))
        families += [
            Family(column.name, model.model_copy(update={"name": str(column.folder), "revision": None}), {})
            for column in own
            if column.whole
        ]
    return tuple(families)


def _origins(models: Sequence[ModelSpec]) -> dict[str, str]:
    """What tells models apart, by the name they are given: a packaged model and its file are one."""
    names = list(dict.fromkeys(model.name for model in models))
    if len(names) < 2:
        return {name: name for name in names}
    return {model.name: resolve(model).origin for model in models}


def _unique_names(columns: Sequence[Column]) -> list[Column]:
    """Folders of one name in two places get a number; so does a folder that is called `base`."""
    taken = {BASE}
    return [dataclasses.replace(column, name=_free(column.name, taken)) for column in columns]


def _free(name: str, taken: set[str]) -> str:
    """The name, with a number where it is taken; it is taken then."""
    wanted, number = name, 2
    while wanted in taken:
        wanted, number = f"{name} ({number})", number + 1
    taken.add(wanted)
    return wanted
