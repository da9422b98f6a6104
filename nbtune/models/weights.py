"""The weight files of a model folder, judged by their headers alone."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from nbtune.errors import ModelError

_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}  # the types that loading casts to the compute dtype


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file."""

    name: str
    dtype: str  # as the header writes it: F32, BF16, U8, ...
    shape: tuple[int, ...]
    size: int  # bytes on disk

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def files(folder: Path) -> list[Path]:
    """The safetensors files that the folder says it consists of, whether they are there or not."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [folder / name for name in names]
    return [folder / "model.safetensors"]


def missing_files(folder: Path) -> list[str]:
    return [file.name for file in files(folder) if not file.is_file()]


def tensors(path: Path) -> Iterator[Tensor]:
    """The tensors of one file. Raises ModelError where the header is broken or the file is not as long as it says."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise _broken(path, f"its header should take {length:,} bytes, the file has {size:,}")
            header = json.loads(file.read(length))
    except ValueError as error:
        if isinstance(error, ModelError):
            raise
        raise _broken(path, f"its header cannot be read ({error})") from error
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise _broken(path, f"it should have {end:,} bytes and has {size:,}")
    for name, entry in header.items():
        begin, stop = entry["data_offsets"]
        yield Tensor(name, entry["dtype"], tuple(entry["shape"]), stop - begin)


def memory(folder: Path, bytes_per_element: int, quantised_bytes: float | None = None) -> int:
    """Bytes that the weights take once loaded with `bytes_per_element`; what is quantised on disk stays as it is.

    With `quantised_bytes` the linear layers in the model's blocks take that much an element.
    """
    total = 0
    for tensor in (tensor for file in files(folder) for tensor in tensors(file)):
        if tensor.dtype not in _BITS:
            total += tensor.size
        elif quantised_bytes is not None and _in_block(tensor):
            total += int(tensor.elements * quantised_bytes)
        else:
            total += tensor.elements * bytes_per_element
    return total


def _in_block(tensor: Tensor) -> bool:
    """Whether this is a linear layer of a numbered block; experts are none, since transformers joins them."""
    return len(tensor.shape) == 2 and re.search(r"\.\d+\.(?!.*experts\.)", tensor.name) is not None


def check(folder: Path) -> None:
    """Raise ModelError where the folder lacks safetensors weights."""
    missing = missing_files(folder)
    if not missing:
        return
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        raise ModelError(
            "The model's weights are pickles",
            f"{folder} has {', '.join(pickles)} and no safetensors; a pickle can run any code when it is loaded.",
            "If you trust its source, convert it once: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder), and name the new folder.",
        )
    raise ModelError(
        "The model's weights are not complete",
        f"{folder} lacks {', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''}.",
        "Download or save the model again.",
    )


def _broken(path: Path, why: str) -> ModelError:
    return ModelError("The model's weights are damaged", f"{path}: {why}.", "Download or save the model again.")
