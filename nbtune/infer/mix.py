"""Weighted combinations of adapters: what one is, and how it becomes an adapter of a model in memory and a folder.

mix = Mix({"amber-heron": 0.7, "quiet-otter": 0.3}, "ties", density=0.5)
column = engine.mix(mix)                # answers like any other column
engine.save_mix(mix, "adapters/both")   # an adapter in PEFT's format
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from nbtune import _files
from nbtune.errors import NbtuneError
from nbtune.kernels.low_rank import COMBINATION_TYPES
from nbtune.models.adapter import save_adapter
from nbtune.peft import PeftModel

COMBINATIONS = COMBINATION_TYPES  # "linear", "cat", "svd", ...: see kernels/low_rank.py
NEED_DENSITY = tuple(kind for kind in COMBINATIONS if kind not in ("linear", "cat", "svd"))


@dataclasses.dataclass(frozen=True)
class Mix:
    """Columns' adapters added up, each times its weight, in one of the ways of PEFT's `add_weighted_adapter`.

    Raises NbtuneError for what no adapters could be combined with.
    """

    weights: Mapping[str, float]  # by column; a weight may be negative
    combination_type: str = "linear"
    density: float | None = None  # the share of the entries that is kept; for those in `NEED_DENSITY`
    majority_sign_method: Literal["total", "frequency"] = "total"  # of ties and dare_ties
    svd_rank: int | None = None  # of those that end in svd; none is the largest rank
    svd_clamp: float | None = None  # of those that end in svd: a quantile
    seed: int = 0  # of the entries that dare_linear and dare_ties keep

    def __post_init__(self) -> None:
        kind = self.combination_type
        if not self.weights:
            raise _refused("There is nothing to combine", "No column has a weight.", "Name one or more.")
        for column, weight in self.weights.items():
            if not math.isfinite(weight):
                raise _refused("A weight is no number", f"{column}: {weight}.", "Give a number, such as 0.5.")
        if kind not in COMBINATIONS:
            message = f"There are: {', '.join(COMBINATIONS)}."
            raise _refused(f"There is no combination {kind!r}", message, "Choose one of them.")
        if kind in NEED_DENSITY and (self.density is None or not 0 < self.density <= 1):
            message = f"{kind} keeps a share of each adapter's entries; density is {self.density}."
            raise _refused("This combination needs a density", message, "Give one above 0 and at most 1, such as 0.5.")
        if self.majority_sign_method not in ("total", "frequency"):
            message = f"It is {self.majority_sign_method!r}."
            raise _refused("majority_sign_method is not known", message, "Choose total or frequency.")
        if self.svd_rank is not None and self.svd_rank < 1:
            raise _refused("A rank is 1 or more", f"svd_rank is {self.svd_rank}.", "Leave it out for the largest rank.")
        if self.svd_clamp is not None and not 0 <= self.svd_clamp <= 1:
            raise _refused("svd_clamp is a quantile", f"It is {self.svd_clamp}.", "Give one from 0 to 1.")

    @property
    def name(self) -> str:
        """`0.7 amber-heron + 0.3 quiet-otter, ties, density 0.5`: all that it is made of, and nothing else."""
        parts = [f"{float(weight)!r} {_quoted(column)}" for column, weight in self.weights.items()]
        said = [f"{name} {value}" for name, value in self.settings.items()]
        return ", ".join([" + ".join(parts).replace("+ -", "- "), self.combination_type, *said])

    @property
    def settings(self) -> dict[str, Any]:
        """What differs from the defaults, besides the weights and the type."""
        fields = [field for field in dataclasses.fields(self) if field.name not in ("weights", "combination_type")]
        found = {field.name: getattr(self, field.name) for field in fields}
        return {field.name: found[field.name] for field in fields if found[field.name] != field.default}


def add(model: PeftModel, mix: Mix, adapters: Mapping[str, str], name: str) -> None:
    """Make the combination an adapter of the model, switched off. adapters: what each column's is called there.

    Raises AdapterError, and adds nothing, where they cannot be combined so.
    """
    with _seeded(mix, next(model.parameters()).device):
        model.add_weighted_adapter(
            [adapters[column] for column in mix.weights],
            list(mix.weights.values()),
            name,
            mix.combination_type,
            svd_rank=mix.svd_rank,
            svd_clamp=mix.svd_clamp,
            density=mix.density,
            majority_sign_method=mix.majority_sign_method,
        )


def write(model: PeftModel, name: str, mix: Mix, sources: Mapping[str, str | Path], folder: Path) -> None:
    """Write the adapter of a combination into a new folder, with a model card that says what it is made of.

    sources: the folder that each column's adapter came from. Raises NbtuneError where the folder exists.
    """
    try:
        with _files.atomic_folder(folder) as temporary:
            save_adapter(model, name, temporary)
            base = model.peft_config[name].base_model_name_or_path
            _files.write_text(temporary / "README.md", _card(mix, sources, base))
    except FileExistsError as error:
        raise _refused("There is something already", f"{folder} exists.", "Choose a new folder.") from error


def _card(mix: Mix, sources: Mapping[str, str | Path], base: str | None) -> str:
    """The model card; JSON is YAML, so names are quoted as JSON."""
    head = ["---", f"base_model: {json.dumps(base)}", "library_name: peft", "tags: [nbtune, merge]", "---"]
    rows = [
        f"| {_cell(column)} | {weight!r} | {_cell(str(sources[column]))} |" for column, weight in mix.weights.items()
    ]
    settings = "".join(f", {name} {value}" for name, value in mix.settings.items())
    return "\n".join(
        [
            *head,
            "",
            "# A combination of adapters",
            "",
            f"Made by nbtune with PEFT's combination type `{mix.combination_type}`{settings}.",
            "",
            "| adapter | weight | from |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def _cell(text: str) -> str:
    """Text in a cell of a Markdown table."""
    return " ".join(re.sub(r"([\\`|<>*_\[\]])", r"\\\1", text).split())


@contextmanager
def _seeded(mix: Mix, device: torch.device) -> Iterator[None]:
    """DARE draws from torch's global generator: the same entries for the same mix, and the generator as it was."""
    if not mix.combination_type.startswith("dare"):
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(mix.seed)
        yield


def _quoted(column: str) -> str:
    return column if re.fullmatch(r"[\w.\-]+", column) else json.dumps(column, ensure_ascii=False)


def _refused(title: str, message: str, remedy: str) -> NbtuneError:
    return NbtuneError(title, message, remedy)
