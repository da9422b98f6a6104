"""An export from beginning to end: checked, loaded, written, read back, compared."""

from __future__ import annotations

import dataclasses
import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from nbtune._transformers import AutoConfig
from nbtune.errors import ExportError, NbtuneError
from nbtune.export import folders, gguf_families, gguf_lora, gguf_model, hub
from nbtune.export.card import public_name
from nbtune.export.outcome import Export, report_path, store
from nbtune.export.precision import PRECISIONS, ROUNDED_BOUND, Precision, choose
from nbtune.export.proof import Answers, Proof, answer, compare, sample_texts, tokens
from nbtune.export.subject import Subject, float_spec, read
from nbtune.models import available_memory, default_device, resolve, weights
from nbtune.models.source import OnStatus, fetch, ignore_status
from nbtune.models.trained import Trained, TrainedLike, default_runs_dir, find_trained

Format = Literal["adapter", "merged", "gguf", "gguf-lora"]
OnProgress = Callable[[float], None]
_CPU = torch.device("cpu")
_SPARE = 1.1  # of memory and disk, beyond the weights


def _ignore_progress(share: float) -> None:
    del share


def export(
    run_or_folder: TrainedLike,
    format: Format,
    out: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = "4GB",
    push_to: str | None = None,
    private: bool = True,
    runs_dir: str | Path | None = None,
    on_status: OnStatus = ignore_status,
    on_progress: OnProgress = _ignore_progress,
    quiet: bool = False,
) -> Export:
    """Write a trained model in a format that others read, and prove it.

    Args:
        run_or_folder: A run, a run id under `runs_dir`, or the folder of a run or of an adapter.
        format: `adapter` (a copy), `merged` (a folder for transformers), `gguf` (a file for llama.cpp), `gguf-lora` (a
            LoRA beside a GGUF base).
        out: The folder or .gguf file to make. Nothing is ever overwritten.
        dtype: bf16 (default), f16, f32 for `merged`; f16 (default), f32, bf16, q8_0, q4_1, q4_0 for `gguf`; f16
            (default), f32, bf16 for `gguf-lora`.
        max_shard_size: The largest file of `merged`, in bytes or as `500MB`, `4GB`.
        push_to: A repository of the model hub to make and to upload the export to, `owner/name`, once it is proved.
        private: Whether only its owner sees that repository.
        runs_dir: The folder of runs; None is `NBTUNE_RUNS`, else `runs`.
        on_status: Told what is being done.
        on_progress: Told the share that is done, 0 to 1.
        quiet: Whether the outcome is not printed.

    What was written is read back and answers a few prompts beside the adapter in memory; the outcome is printed,
    returned and stored in `export.json`. Raises NbtuneError before anything is written where it cannot be done, and
    ExportError where the proof fails, or the hub takes nothing; the files then stay where they are.
    """
    precision = choose(format, dtype)
    shard_bytes = folders.shard_bytes(max_shard_size)
    if push_to is not None:
        hub.check_name(push_to)
    target = _target(Path(out), format)
    trained = find_trained(run_or_folder, Path(runs_dir or default_runs_dir()))
    _check_kind(trained, format)
    folder = fetch(resolve(float_spec(trained, "float32")), on_status)
    if format.startswith("gguf"):
        gguf_families.check(AutoConfig.from_pretrained(folder, local_files_only=True))
    computed_in = _check_room(trained, folder, format, precision, target)

    subject = read(trained, float_spec(trained, computed_in), _CPU, on_status)
    if subject.is_prompt and format != "adapter":
        raise ExportError(
            f"{trained.label} cannot be {format}", "A trained prompt is no change of a weight.", "Export the adapter."
        )
    on_progress(0.3)
    texts = sample_texts(subject.tokenizer)
    prompts = tokens(texts, subject.tokenizer)
    on_status("Asking the adapter in memory")
    expected = answer(subject.model, prompts)
    quantised = _quantised(trained, prompts, expected, on_status) if format in ("merged", "gguf") else None

    on_progress(0.5)
    on_status(f"Writing {target}")
    _write(subject, format, target, precision, shard_bytes)
    on_progress(0.75)
    done = Export(
        path=target,
        format=format,
        dtype=precision.name if precision else None,
        source=trained.name,
        base=public_name(trained.model.name),
        bytes=_size(target),
        computed_in=computed_in,
        proof=_unproved(),
        from_quantised=quantised,
    )
    store(done)
    rounded = answer(subject.model, prompts) if format == "gguf" and precision and precision.in_blocks else None
    on_status("Reading it back")
    done = _proved(done, subject, texts, prompts, expected, rounded, precision)
    store(done)
    if not quiet:
        print(done)  # noqa: T201 - the outcome is what a person waits for
    if not done.proved:
        raise _failed(done)
    if push_to is not None:
        on_progress(0.9)
        done = dataclasses.replace(done, pushed_to=hub.push(done, trained, precision, push_to, private, on_status))
        store(done)
    on_progress(1.0)
    return done


def _target(out: Path, format: str) -> Path:
    """The absolute path. Raises ExportError where it is taken, or has the wrong ending."""
    is_file = format.startswith("gguf")
    if is_file and out.suffix != ".gguf":
        raise ExportError("The file must end in .gguf", f"It is {out}.", f"Name it {out.with_suffix('.gguf')}.")
    out = out.expanduser().absolute()
    for path in (out, *([report_path(out)] if is_file else [])):
        if path.exists():
            raise ExportError(f"{path} exists already", "Nothing is ever overwritten.", "Choose another name.")
    return out


def _check_kind(trained: Trained, format: str) -> None:
    if trained.whole and format in ("adapter", "gguf-lora"):
        raise ExportError(
            f"{trained.name} has no adapter", "It trained every weight (method='full').", "Export it as merged or gguf."
        )


def _check_room(trained: Trained, folder: Path, format: str, precision: Precision | None, target: Path) -> str:
    """The precision to compute in: float32 where there is memory for it, else bfloat16.

    Raises ExportError where there is too little memory or disk.
    """
    weights.check(folder)
    copies = 1 if format in ("adapter", "gguf-lora") else 2  # merging holds adapted weights twice
    free = available_memory(_CPU)
    needs = {name: int(_SPARE * copies * weights.memory(folder, size)) for name, size in _COMPUTED_IN.items()}
    fitting = [name for name, needed in needs.items() if needed <= free]
    if not fitting:
        raise ExportError(
            f"Not enough memory to export {trained.name}",
            f"It takes {min(needs.values()) / 1e9:.1f} GB; {free / 1e9:.1f} GB is free.",
            "Close other programs and notebooks.",
        )
    if format in ("merged", "gguf"):
        assert precision is not None
        size = weights.memory(folder, 1) * precision.bits / 8
    else:
        size = sum(path.stat().st_size for path in trained.folder.iterdir() if path.is_file())
    parent = next(path for path in target.parents if path.exists())
    room = shutil.disk_usage(parent).free
    if size * _SPARE > room:
        raise ExportError(
            f"Not enough room on the disk of {parent}",
            f"The export takes {size / 1e9:.1f} GB; {room / 1e9:.1f} GB is free.",
            "Free some space, or choose another folder.",
        )
    return fitting[0]


_COMPUTED_IN = {"float32": 4, "bfloat16": 2}  # bytes a weight, by preference


def _quantised(trained: Trained, prompts: list[list[int]], expected: Answers, on_status: OnStatus) -> Proof | None:
    """How far the float base with the adapter is from the quantised one that the adapter was trained on."""
    if trained.model.quantised_bytes is None or trained.whole:
        return None
    on_status("Asking the adapter on its quantised base")
    subject = read(trained, trained.model, default_device(), on_status)
    found = answer(subject.model, prompts)
    del subject
    gc.collect()
    return compare(expected, found, bound=float("inf"), read_by="nbtune")


def _write(subject: Subject, format: str, target: Path, precision: Precision | None, shard_bytes: int) -> None:
    """Write the export whole. Raises ExportError where the disk takes no more; nothing is left behind."""
    try:
        if precision is None:
            folders.write_adapter(subject, target)
        elif format == "merged":
            folders.write_merged(subject, target, precision, shard_bytes)
        elif format == "gguf":
            gguf_model.write_gguf(subject, target, precision)
        else:
            gguf_lora.write_gguf_lora(subject, target, precision)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in its own words
        raise ExportError(
            f"{target.name} could not be written",
            f"{error}".splitlines()[0],
            f"Nothing was left behind in {target.parent}. Make room there, or choose another folder.",
        ) from error


def _proved(
    done: Export,
    subject: Subject,
    texts: list[str],
    prompts: list[list[int]],
    expected: Answers,
    rounded: Answers | None,
    precision: Precision | None,
) -> Export:
    """The export with its proof: read back, asked, compared."""
    model, read_by = _read_back(done, subject)
    bound, rounded_bound = precision.bound if precision else 0.0, ROUNDED_BOUND
    if done.computed_in != "float32" and precision:
        bound, rounded_bound = (max(least, PRECISIONS["bf16"].bound) for least in (bound, rounded_bound))
    found = answer(model, prompts)
    return dataclasses.replace(
        done,
        proof=compare(expected, found, bound=bound, read_by=read_by),
        rounded=compare(rounded, found, bound=rounded_bound, read_by=read_by) if rounded is not None else None,
        same_tokens=gguf_model.same_tokens(done.path, subject.tokenizer, texts) if done.format == "gguf" else None,
    )


def _read_back(done: Export, subject: Subject) -> tuple[Any, str]:
    """The written model, and what read it. The one in memory makes room. Raises ExportError where it cannot be read."""
    try:
        return _reader(done, subject)
    except NbtuneError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ExportError(
            "What was written cannot be read back",
            f"{type(error).__name__}: {error}".splitlines()[0],
            f"{done.path} was left as it is; do not use it.",
        ) from error


def _reader(done: Export, subject: Subject) -> tuple[Any, str]:
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[done.computed_in]
    if done.format == "adapter":
        return folders.read_adapter(subject, done.path), "nbtune"
    if done.format == "gguf-lora":
        return gguf_lora.read_gguf_lora(subject, done.path), "gguf, applied by nbtune"
    config = subject.model.config
    subject.forget()
    if done.format == "merged":
        return folders.read_merged(done.path, dtype), "transformers"
    return gguf_model.read_gguf(done.path, config, dtype), "transformers"


def _unproved() -> Proof:
    nan = float("nan")
    return Proof("nobody yet", 0, 0, nan, nan, 0.0, 0, 0)


def _failed(done: Export) -> ExportError:
    if done.same_tokens is False:
        message = "The tokenizer in the file splits sample texts otherwise than the model's own."
    elif done.rounded is not None and done.rounded.holds:
        message = f"{done.proof}. The file is right, but {done.dtype} keeps too little of this model; try more bits."
    else:
        message = f"{done.rounded or done.proof}"
    return ExportError(
        "What was written does not answer as the adapter does",
        message,
        f"{done.path} was left as it is; do not use it. {done.report.name} has the numbers.",
    )


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
