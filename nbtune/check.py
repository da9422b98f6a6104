"""check(spec): what would go wrong, and the remedy, before anything starts.

for problem in nt.check(spec):
print(problem)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nbtune.errors import AdapterError, NbtuneError, RunError
from nbtune.peft.config import LayerConfig
from nbtune.plan import format_bytes, plan
from nbtune.spec import RunSpec

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong (`error`: the run would fail) or unwise (`warning`)."""

    title: str
    message: str = ""
    remedy: str = ""
    severity: Severity = "error"
    setting: str | None = None  # the path of the setting to change, as in `settings`

    def __str__(self) -> str:
        return "\n".join(part for part in (f"{self.severity}: {self.title}", self.message, self.remedy) if part)


def check(spec: RunSpec, *, runs_dir: str | Path | None = None) -> list[Problem]:
    """Every problem that can be seen without loading the weights; an empty list where there is none.

    Reads the model's config and the data, and asks the tracking server, so it can take some seconds.

    Args:
        spec: The run to be.
        runs_dir: Where its folder would be made; None leaves that unchecked.
    """
    looks: list[Callable[[], Iterator[Problem]]] = [
        lambda: _runs_dir(runs_dir),
        lambda: _tracking(spec, runs_dir),
        lambda: _data(spec),
        lambda: _model(spec),
    ]
    return [problem for look in looks for problem in look()]


def require(spec: RunSpec, *, runs_dir: str | Path | None = None) -> None:
    """Raise NbtuneError with the first error that `check` finds, and name the others."""
    errors = [problem for problem in check(spec, runs_dir=runs_dir) if problem.severity == "error"]
    if errors:
        first, others = errors[0], errors[1:]
        also = [f"Also: {problem.title}. {problem.remedy}".rstrip() for problem in others]
        raise NbtuneError(
            first.title, "\n".join([part for part in (first.message, first.remedy) if part]), "\n".join(also)
        )


def _problem(error: NbtuneError, setting: str | None) -> Problem:
    return Problem(error.title, error.message, error.remedy, setting=setting)


def _runs_dir(runs_dir: str | Path | None) -> Iterator[Problem]:
    if runs_dir is None:
        return
    folder = Path(runs_dir).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return
    except OSError as error:
        yield Problem(
            "The runs folder cannot be written to",
            f"{folder}: {error.strerror}",
            "Choose another with --runs-dir, runs_dir=... or the environment variable NBTUNE_RUNS.",
        )


def _tracking(spec: RunSpec, runs_dir: str | Path | None) -> Iterator[Problem]:
    if not spec.tracking.mlflow:
        return
    from nbtune.store import require_reachable, tracking_uri

    try:
        require_reachable(tracking_uri(spec.tracking, Path(runs_dir or ".")))
    except RunError as error:
        yield _problem(error, "tracking.tracking_uri")


def _data(spec: RunSpec) -> Iterator[Problem]:
    from nbtune.data import read_rows

    try:
        read_rows(spec.data)
    except NbtuneError as error:
        yield _problem(error, "data.source")


def _model(spec: RunSpec) -> Iterator[Problem]:
    from nbtune.models import describe

    try:
        info = describe(spec.model)
    except NbtuneError as error:
        yield _problem(error, "model.name")
        return

    context, prompt = info.context_length, spec.virtual_tokens
    if context is not None and spec.training.max_length + prompt > context:
        before = f", and {prompt} virtual tokens come before each example" if prompt else ""
        yield Problem(
            f"max_length is longer than the model's context of {context} tokens",
            f"training.max_length is {spec.training.max_length}{before}.",
            f"Set max_length to {context - prompt} or less.",
            setting="training.max_length",
        )
    try:
        planned = plan(spec)
    except AdapterError as error:
        yield _problem(error, "method.target_modules" if isinstance(spec.method, LayerConfig) else None)
        return
    needed, available = planned.peak_bytes, planned.available_bytes
    if needed > available:
        yield Problem(
            "The run may need more memory than there is",
            f"About {format_bytes(needed)} are needed and {format_bytes(available)} are free.",
            "Lower max_length or per_device_train_batch_size, or set gradient_checkpointing.",
            severity="warning",
            setting="training.max_length",
        )
