"""What a sweep is going to do: its trials, and what each will take, before anything runs.

forecasts = Forecaster(memory_bytes=8_000_000_000)
forecasts(spec)      # Forecast(seconds=480.0, peak_bytes=1_620_000_000, refused="")

Time is that of training alone: a trial also starts a kernel and loads the model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nbtune.errors import NbtuneError, SweepError
from nbtune.plan import format_bytes, format_seconds, plan
from nbtune.spec import RunSpec
from nbtune.sweep.space import Point

if TYPE_CHECKING:
    from rich.table import Table

# Settings that change neither the memory nor the time of a step, so that one plan serves all their values.
NO_MATTER = (
    "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "label_smoothing_factor", "seed",
    "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a trial will take; None where that is not known before it runs."""

    seconds: float | None = None  # of training alone
    peak_bytes: int | None = None
    refused: str = ""  # why it will not be tried; "" where it will


@dataclasses.dataclass(frozen=True)
class Preview:
    """The trials of a sweep with their forecasts. `str()` shows them as a table."""

    trials: Sequence[tuple[Point, Forecast]]
    jobs: int
    to_come: int = 0  # trials whose points follow from the results of earlier ones

    @property
    def seconds(self) -> float | None:
        """Of all trials known, `jobs` at a time; None where that of one is not known."""
        times = [forecast.seconds for _, forecast in self.trials if not forecast.refused]
        known = [seconds for seconds in times if seconds is not None]
        return sum(known) / self.jobs if known and len(known) == len(times) else None

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, color_system=None)
        with console.capture() as captured:
            console.print(self.table())
            console.print(self.sentence(), highlight=False)
        return captured.get().rstrip()

    def sentence(self) -> str:
        refused = sum(bool(forecast.refused) for _, forecast in self.trials)
        count = len(self.trials) - refused + self.to_come
        parts = [f"{count} {'trial' if count == 1 else 'trials'}, {self.jobs} at a time"]
        if self.to_come:
            parts.append(f"{self.to_come} of them chosen as results come in")
        if refused:
            parts.append(f"{refused} refused")
        if self.seconds is not None:
            parts.append(f"about {format_seconds(self.seconds)} of training")
        return ", ".join(parts) + "."

    def table(self) -> Table:
        from rich.table import Table

        names = list(dict.fromkeys(name for point, _ in self.trials for name in point))
        table = Table("trial", *names, "time", "memory", "", box=None, header_style="bold")
        for number, (point, forecast) in enumerate(self.trials, 1):
            values = [show(point[name]) if name in point else "" for name in names]
            seconds = format_seconds(forecast.seconds) if forecast.seconds is not None else "?"
            memory = format_bytes(forecast.peak_bytes) if forecast.peak_bytes is not None else "?"
            style = "dim" if forecast.refused else ""
            table.add_row(str(number), *values, seconds, memory, forecast.refused, style=style)
        return table


class Forecaster:
    """Plans trials for `memory_bytes` each (None: what the machine has free); trials of one shape are planned once."""

    def __init__(self, memory_bytes: int | None) -> None:
        self._memory_bytes = memory_bytes
        self._known: dict[str, Forecast] = {}

    def __call__(self, spec: RunSpec | None) -> Forecast:
        if spec is None:
            return Forecast()
        values = spec.to_dict()
        values["training"] = {name: value for name, value in values["training"].items() if name not in NO_MATTER}
        key = json.dumps([values["model"], values["method"], values["training"]], sort_keys=True)
        if key not in self._known:
            self._known[key] = self._forecast(spec)
        return self._known[key]

    def _forecast(self, spec: RunSpec) -> Forecast:
        try:
            planned = plan(spec, available_bytes=self._memory_bytes, in_new_process=True)
        except NbtuneError as error:
            raise SweepError("A trial cannot be run", str(error)) from error
        too_large = f"needs {format_bytes(planned.peak_bytes)}, there are {format_bytes(planned.available_bytes)}"
        return Forecast(planned.seconds, planned.peak_bytes, "" if planned.fits else too_large)


def show(value: Any) -> str:
    """A value as a table has it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
