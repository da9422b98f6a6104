"""GGUF models, converted once to safetensors in the user's cache folder.

Reading a GGUF takes transformers about 25 s for 135M parameters, its tokenizer included; the converted folder
about 2 s. The folder's name carries the hash of the GGUF's content, so that a changed file is converted anew.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from nbtune._files import atomic_folder
from nbtune.errors import ModelError
from nbtune.models import weights

# Quantised values times their scale are exact in fp32 only: kept so, unless the fp32 copy would be many gigabytes.
_LARGE_GGUF = 1 << 30  # bytes
_LAYOUT = "1"  # part of the folder's name; raise it when the conversion changes


def root() -> Path:
    """The folder for converted models: `$NBTUNE_CACHE`, else nbtune's folder in the platform's cache folder."""
    if chosen := os.environ.get("NBTUNE_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "nbtune"


def converted(gguf: Path, on_status: Callable[[str], None]) -> Path:
    """The folder with `gguf` as safetensors, config and tokenizer; converted now where it is not there yet.

    Safe when several processes ask at once: one converts, the others wait. A damaged folder is made again.
    Raises ModelError where the GGUF cannot be read or the cache folder cannot be written.
    """
    from filelock import FileLock, Timeout

    stat = gguf.stat()
    name = re.sub(r"[^a-z0-9]+", "-", gguf.stem.lower()).strip("-")
    folder = root() / "models" / f"{name}-{_content_hash(gguf, stat.st_size, stat.st_mtime_ns)}-{_LAYOUT}"
    if _is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_status(f"Waiting for another process that converts {gguf.name}")
            lock.acquire()
        try:
            if not _is_whole(folder):  # another process may have made it while this one waited
                _remove_remains(folder)
                on_status(
                    f"Converting {gguf.name} to safetensors, once (about {_estimated_seconds(stat.st_size):.0f} s)"
                )
                _convert(gguf, folder, "float32" if stat.st_size < _LARGE_GGUF else "bfloat16")
        finally:
            lock.release()
    except OSError as error:
        raise ModelError(
            "The model cannot be converted",
            f"{folder.parent}: {error.strerror or error}.",
            "Free some space there, or set NBTUNE_CACHE to a folder that can be written.",
        ) from error
    return folder


@functools.lru_cache
def _content_hash(path: Path, size: int, modified: int) -> str:  # noqa: ARG001 - size and time only tell changed files apart
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _estimated_seconds(size: int) -> float:
    return 20 + size / 20e6  # reading the vocabulary, then the weights; measured on 2 cores


def _is_whole(folder: Path) -> bool:
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer.json", "tokenizer_config.json")):
        return False
    if weights.missing_files(folder):
        return False
    try:
        for file in weights.files(folder):
            list(weights.tensors(file))
    except ModelError:
        return False
    return True


def _remove_remains(folder: Path) -> None:
    """Remove a damaged folder and what killed conversions left beside it. Only under the lock."""
    for path in [folder, *folder.parent.glob(f".{folder.name}.*")]:
        if path.is_dir():
            shutil.rmtree(path)


def _convert(gguf: Path, folder: Path, dtype: str) -> None:
    """Convert in a process of its own: this one keeps its memory, its progress bars and its GIL for the notebook."""
    script = Path(__file__).with_name("_convert.py")
    with atomic_folder(folder) as temporary:
        process = subprocess.run(  # noqa: S603 - this interpreter, on a file of this package
            [sys.executable, "-P", str(script), str(gguf), str(temporary), dtype],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        if process.returncode != 0:
            lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
            raise ModelError(
                "The GGUF model cannot be read",
                f"{gguf}: {lines[-1] if lines else f'the conversion ended with status {process.returncode}'}",
                "The file may be cut short, or of an architecture that transformers does not read from GGUF;"
                " download it again, or use the model's safetensors.",
            )
