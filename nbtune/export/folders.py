"""Exports that are folders: the adapter as it is, and the merged model for plain transformers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch

from nbtune._files import atomic_folder
from nbtune._transformers import AutoModelForCausalLM
from nbtune.errors import ExportError
from nbtune.export.card import CARD, card
from nbtune.export.precision import Precision
from nbtune.export.subject import Subject
from nbtune.models.loader import no_progress_bars
from nbtune.peft import PeftModel

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_ADAPTER_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt")


def write_adapter(subject: Subject, out: Path) -> None:
    """Copy the adapter's folder, with a model card. Subfolders, dot files and pickles stay behind."""
    with atomic_folder(out) as folder:
        for path in sorted(subject.trained.folder.iterdir()):
            if path.is_file() and path.suffix in _ADAPTER_SUFFIXES and not path.name.startswith("."):
                shutil.copyfile(path, folder / path.name)
        (folder / CARD).write_text(card(subject.trained, "adapter", None), encoding="utf-8")


def read_adapter(subject: Subject, folder: Path) -> Any:
    """The written adapter on the same base, in place of the one that was exported."""
    model = subject.model
    assert isinstance(model, PeftModel)
    return PeftModel.from_pretrained(model.unload(), folder)  # pyright: ignore[reportArgumentType]


def shard_bytes(size: int | str) -> int:
    """The bytes of `500MB` or `4GB`. Raises ExportError for what is no size."""
    found = re.fullmatch(r"([1-9]\d*) ?(|KB|MB|GB)", str(size).upper())
    if found is None:
        raise ExportError(f"{size!r} is no size of a file", "", "Write max_shard_size as 500MB or 4GB, or in bytes.")
    return int(found[1]) * _UNITS[found[2]]


def write_merged(subject: Subject, out: Path, precision: Precision, shard_bytes: int) -> None:
    """Write the merged model with its tokenizer, chat template, generation config and a model card.

    No file of weights has more than `shard_bytes`, unless a single weight has. Raises ExportError where a
    weight is too large for the precision; nothing is left behind.
    """
    model = subject.merge()
    dtype = torch_dtype(precision)
    for name, parameter in model.named_parameters():
        check_range(name, parameter, dtype)
    model.to(dtype)
    vars(model.config).pop("_name_or_path", None)  # a folder of this machine would mean nothing elsewhere
    with atomic_folder(out) as folder:
        with no_progress_bars():
            model.save_pretrained(folder, max_shard_size=shard_bytes)
        subject.tokenizer.save_pretrained(folder)
        (folder / CARD).write_text(card(subject.trained, "merged", precision), encoding="utf-8")


def read_merged(folder: Path, dtype: torch.dtype) -> Any:
    """The written model, read by plain transformers."""
    with no_progress_bars():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)


def torch_dtype(precision: Precision) -> torch.dtype:
    assert precision.torch_name is not None
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[precision.torch_name]


def check_range(name: str, weight: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise ExportError where a weight is no finite number, or would be none in `dtype`."""
    largest = float(weight.detach().abs().max()) if weight.numel() else 0.0
    if not largest <= torch.finfo(dtype).max:
        short = str(dtype).removeprefix("torch.")
        raise ExportError(
            f"The weights do not fit {short}",
            f"{name} holds {largest:g}; the largest number in {short} is {torch.finfo(dtype).max:g}.",
            "Choose bf16 or f32."
            if largest < float("inf")
            else "The training has diverged: export another checkpoint.",
        )
