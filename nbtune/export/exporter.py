"""An export from beginning to end: checked, loaded, written, read back, compared."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from nbtune import _files
from nbtune._transformers import AutoConfig
from nbtune.errors import ExportError, NbtuneError
from nbtune.export import folders, gguf_families, gguf_lora, gguf_model
from nbtune.export.card import public_name
from nbtune.export.precision import PRECISIONS, ROUNDED_BOUND, Precision, choose
from nbtune.export.proof import Answers, Proof, answer, compare, sample_texts, tokens
from nbtune.export.subject import Subject, float_spec, read
from nbtune.models import available_memory, default_device, resolve, weights
from nbtune.models.source import OnStatus, fetch, ignore_status
from nbtune.models.trained import Trained, TrainedLike, default_runs_dir, find_trained

Format = Literal["adapter", "merged", "gguf", "gguf-lora"]
_CPU = torch.device("cpu")
_SPARE = 1.1  # of memory and disk, beyond the weights


@dataclasses.dataclass(frozen=True)
class Export:
    """What was written, and how near it is to the adapter in memory."""

    path: Path
    format: str
    dtype: str | None
    source: str  # name of the run or the adapter
    base: str
    bytes: int
    computed_in: str  # precision of both sides of the proof
    proof: Proof
    # The same for the weights as they were rounded for block types, in memory: whether the file says what was meant.
    rounded: Proof | None = None
    # How far merging onto float weights is from the quantised ones that were trained on; none where they were floats.
    from_quantised: Proof | None = None
    same_tokens: bool | None = None  # whether a GGUF's tokenizer reads the prompts as the original does

    @property
    def proved(self) -> bool:
        """Whether what was written answers as it should."""
        return self.proof.holds and (self.rounded is None or self.rounded.holds) and self.same_tokens is not False

    @property
    def report(self) -> Path:
        """Where this is stored."""
        return report_path(self.path)

    def __str__(self) -> str:
        text = f"{self.path}: {self.format}{f' {self.dtype}' if self.dtype else ''}, {self.bytes / 1e6:,.1f} MB\n"
        text += f"proof: {self.proof}"
        if self.rounded is not None:
            text += f"\nagainst the same weights rounded in memory: {self.rounded}"
        if self.from_quantised is not None:
            text += f"\nfrom the quantised base that it was trained on: {self.from_quantised}"
        return text


def report_path(out: Path) -> Path:
    """`export.json` in a folder; `NAME.export.json` beside a file."""
    return out / "export.json" if out.is_dir() else out.with_suffix(".export.json")


def export(
    run_or_folder: TrainedLike,
    format: Format,
    out: str | Path,
    *,
    dtype: str | None = None,
    runs_dir: str | Path | None = None,
    on_status: OnStatus = ignore_status,
) -> Export:
    """Write a trained model in a format that others read, and prove it.

    Args:
        run_or_folder: A run, a run id under `runs_dir`, or the folder of a run or of an adapter.
        format: `adapter` (a copy), `merged` (a folder for transformers), `gguf` (a file for llama.cpp), `gguf-lora` (a
            LoRA beside a GGUF base).
        out: The folder or .gguf file to make. Nothing is ever overwritten.
        dtype: bf16 (default), f16, f32 for `merged`; f16 (default), f32, bf16, q8_0, q4_1, q4_0 for `gguf`; f16
            (default), f32, bf16 for `gguf-lora`.
        runs_dir: The folder of runs; None is `NBTUNE_RUNS`, else `runs`.
        on_status: Told what is being done.

    What was written is read back and answers a few prompts beside the adapter in memory; the outcome is printed,
    returned and stored in `export.json`. Raises NbtuneError before anything is written where it cannot be done, and
    ExportError where the proof fails; the files then stay where they are.
    """
    precision = choose(format, dtype)
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
    texts = sample_texts(subject.tokenizer)
    prompts = tokens(texts, subject.tokenizer)
    on_status("Asking the adapter in memory")
    expected = answer(subject.model, prompts)
    quantised = _quantised(trained, prompts, expected, on_status) if format in ("merged", "gguf") else None

    on_status(f"Writing {target}")
    _write(subject, format, target, precision)
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
    _store(done)
    rounded = answer(subject.model, prompts) if format == "gguf" and precision and precision.in_blocks else None
    on_status("Reading it back")
    done = _proved(done, subject, texts, prompts, expected, rounded, precision)
    _store(done)
    print(done)  # noqa: T201 - the outcome is what a person waits for
    if not done.proved:
        raise _failed(done)
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


def _write(subject: Subject, format: str, target: Path, precision: Precision | None) -> None:
    if precision is None:
        folders.write_adapter(subject, target)
        return
    write = {
        "merged": folders.write_merged,
        "gguf": gguf_model.write_gguf,
        "gguf-lora": gguf_lora.write_gguf_lora,
    }
    write[format](subject, target, precision)


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


def _store(done: Export) -> None:
    values = dataclasses.asdict(done) | {
        "path": done.path.name,
        "proved": done.proved,
        "nbtune": version("nbtune"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    _files.write_text(done.report, json.dumps(_without_infinities(values), indent=2) + "\n")


def _without_infinities(value: Any) -> Any:
    """JSON has no nan and no infinity: null."""
    if isinstance(value, dict):
        return {key: _without_infinities(item) for key, item in value.items()}
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
