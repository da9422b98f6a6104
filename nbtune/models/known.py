"""The models that are on this machine already, and may be chosen without a download.

known_models(Path())     # [Known("smollm2-135m-instruct", "packaged", 95_000_000), ...]
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from nbtune.errors import ModelError
from nbtune.models.source import PACKAGED, resolve
from nbtune.spec import ModelSpec

MOST = 40  # of each kind


@dataclasses.dataclass(frozen=True)
class Known:
    """A model that is here."""

    name: str  # as ModelSpec.name takes it
    kind: Literal["packaged", "local", "cached"]
    size: int  # bytes of its weights on disk


def known_models(folder: Path) -> list[Known]:
    """Packaged models that are installed, GGUF files and model folders in `folder`, and what is in the hub's cache."""
    found: list[Known] = []
    for of_kind in (_packaged(), _local(folder), _cached()):
        found += [model for _, model in zip(range(MOST), of_kind, strict=False)]
    return found


def _packaged() -> Iterator[Known]:
    for name, (package, file, _) in PACKAGED.items():
        if importlib.util.find_spec(package) is None:
            continue
        try:
            source = resolve(ModelSpec(name=name))
        except ModelError:  # the package is there, its file is damaged
            continue
        assert source.path is not None
        yield Known(name, "packaged", (source.path / file).stat().st_size)


def _local(folder: Path) -> Iterator[Known]:
    """Of the folder itself and of the folders in it; those that begin with a dot are not looked into."""
    inside = sorted(path for path in folder.glob("*/") if not path.name.startswith("."))
    for place in (folder, *inside):
        for file in sorted(place.glob("*.gguf")):
            yield Known(f"./{file.relative_to(folder)}", "local", file.stat().st_size)
        if (place / "config.json").is_file() and (weights := list(place.glob("*.safetensors"))):
            name = f"./{place.relative_to(folder)}" if place != folder else str(folder.absolute())
            yield Known(name, "local", sum(file.stat().st_size for file in weights))


def _cached() -> Iterator[Known]:
    from huggingface_hub import constants

    prefix = "models--"
    for place in sorted(Path(constants.HF_HUB_CACHE).glob(f"{prefix}*/")):
        weights = {file.resolve() for file in place.glob("snapshots/*/*.safetensors")}
        if weights and any(place.glob("snapshots/*/config.json")):
            name = place.name.removeprefix(prefix).replace("--", "/")
            yield Known(name, "cached", sum(file.stat().st_size for file in weights if file.is_file()))
