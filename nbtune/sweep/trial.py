"""One trial of a sweep, as the ledger tells it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from nbtune.errors import SweepError
from nbtune.run import Run
from nbtune.sweep.space import Point
from nbtune.train.events import Event

State = Literal[
    "waiting",
    "running",
    "finished",
    "failed",  # a cell raised, or the notebook made no run
    "died",  # its kernel or its process was killed, or ran out of memory
    "timed out",
    "stopped",  # by a person
    "stopped early",  # others did better by then
    "refused",  # before it ran: it does not fit, or is the same as another
]
STATES: tuple[State, ...] = get_args(State)
UNSUCCESSFUL = ("failed", "died", "timed out")  # what `retry` runs again

# What is kept of a run's summary. Losses are nats per labelled token, memory is bytes.
METRICS = (
    "eval_loss_after", "eval_loss_before", "train_loss", "steps", "train_seconds", "train_tokens",
    "train_tokens_per_second", "measured_peak_bytes", "trainable_parameters",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Trial:
    """One trial: its point of the space, how it stands, and what came of it."""

    sweep: Path  # the sweep's folder
    number: int  # from 1
    params: Point
    state: State = "waiting"
    attempt: int = 0  # how often it was started: more than once where the sweep was killed meanwhile
    run_id: str | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    error: str | None = None
    seconds: float | None = None  # from its start to its end, all of the notebook
    predicted_seconds: float | None = None
    predicted_bytes: int | None = None

    @property
    def name(self) -> str:
        return f"{self.number:03d}"

    @property
    def run_prefix(self) -> str:
        """How the ids of the runs of this attempt begin."""
        return self.name if self.attempt < 2 else f"{self.name}.{self.attempt}"

    @property
    def notebook(self) -> Path:
        """The executed notebook: the trial's report."""
        return self.sweep / f"{self.name}.ipynb"

    @property
    def log(self) -> Path:
        """What its process wrote beside the notebook."""
        return self.sweep / f"{self.name}.log"

    @property
    def run_path(self) -> Path | None:
        """The folder of the last run that the notebook made, None where there is none (yet)."""
        specs = (self.sweep / "runs").glob(f"{self.run_prefix}-*/spec.yaml")
        newest = max(specs, key=lambda file: file.stat().st_mtime, default=None)
        return newest.parent if newest is not None else None

    @property
    def run(self) -> Run | None:
        """The last run that the notebook made, None where there is none (yet)."""
        path = self.run_path
        return Run.at(path) if path is not None else None


def fold(sweep: Path, events: Iterable[Event]) -> dict[int, Trial]:
    """The trials of a ledger by their number.

    A trial that was running when its sweep was opened again was interrupted: it waits for another attempt.
    """
    trials: dict[int, Trial] = {}
    for event in events:
        if event["type"] in ("open", "close"):
            trials = interrupted(trials)
        if "trial" not in event:
            continue
        number = event["trial"]
        if event["type"] == "trial":
            trials[number] = Trial(
                sweep,
                number,
                event["params"],
                state="refused" if event["refused"] else "waiting",
                error=event["refused"] or None,
                predicted_seconds=event["predicted_seconds"],
                predicted_bytes=event["predicted_bytes"],
            )
        elif event["type"] == "start":
            fresh = {"run_id": None, "metrics": {}, "error": None, "seconds": None}
            trials[number] = dataclasses.replace(trials[number], state="running", attempt=event["attempt"], **fresh)
        elif event["type"] == "retry":
            trials[number] = dataclasses.replace(trials[number], state="waiting")
        elif event["type"] == "end":
            kept = {name: event[name] for name in ("state", "run_id", "metrics", "error", "seconds")}
            trials[number] = dataclasses.replace(trials[number], **kept)
    return trials


def interrupted(trials: dict[int, Trial]) -> dict[int, Trial]:
    """The trials after the end of their sweep's process: what was running waits for another attempt."""
    return {
        number: dataclasses.replace(trial, state="waiting") if trial.state == "running" else trial
        for number, trial in trials.items()
    }


def best(trials: Iterable[Trial], metric: str, *, maximise: bool) -> Trial | None:
    """The trial whose run ended well with the best value of a metric; None where no run has it."""
    ended = [trial for trial in trials if trial.state in ("finished", "stopped", "stopped early")]
    valued = [trial for trial in ended if trial.metrics.get(metric) is not None]
    return min(valued, key=lambda trial: trial.metrics[metric] * (-1 if maximise else 1), default=None)


def find(trials: dict[int, Trial], which: int | Trial) -> Trial:
    """A trial by its number. Raises SweepError where there is none."""
    number = which.number if isinstance(which, Trial) else which
    if number not in trials:
        raise SweepError(f"There is no trial {number}", "", f"There are 1 to {max(trials, default=0)}.")
    return trials[number]
