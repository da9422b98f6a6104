"""What a run's events come to: how far it is, what it is doing, its figures, and the lines of its log."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nbtune.spec import RunSpec
from nbtune.train.events import Event, EventLog

Status = Literal["created", "running", "paused", "stopped", "finished", "failed", "interrupted"]


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int
    total_steps: int | None  # None until the data is read
    eta_seconds: float | None
    tokens_per_second: float | None
    message: str  # what is being done now


class Journal:
    """Writes the events of a run in its folder, and a line of `log.txt` for each."""

    def __init__(self, folder: Path) -> None:
        self._events = EventLog(folder)
        self._log = (folder / "log.txt").open("a", encoding="utf-8", buffering=1)

    def __call__(self, event: Event) -> None:
        self._log.write(log_line(self._events.append(event)) + "\n")

    def note(self, text: str) -> None:
        """Write `text` into the log."""
        self._log.write(text)

    def close(self) -> None:
        self._events.close()
        self._log.close()


def progress(events: list[Event], status: Status) -> Progress:
    """Step, total, time left and what is being done now."""
    starts = [event for event in events if event["type"] == "start"]
    steps = [event for event in events if event["type"] == "train"]
    total = starts[-1]["total_steps"] if starts else None
    step = steps[-1]["step"] if steps else 0
    recent = steps[-20:]
    pace = sum(event["tokens"] / event["tokens_per_second"] for event in recent) / len(recent) if recent else None
    left = (total - step) * pace if status == "running" and total is not None and pace is not None else None
    return Progress(step, total, left, recent[-1]["tokens_per_second"] if recent else None, _message(status, events))


def living(events: list[Event]) -> Status:
    """What a run that has a thread is doing. MLflow may warn while it is paused."""
    last = next((event["type"] for event in reversed(events) if event["type"] != "warning"), None)
    return "paused" if last == "pause" else "running"


def summarise(run_id: str, spec: RunSpec, events: list[Event], status: str) -> dict[str, Any]:
    """The figures of a run from its events. Losses are nats per labelled token; memory is bytes."""
    start = next((event for event in reversed(events) if event["type"] == "start"), {})
    steps = [event for event in events if event["type"] == "train"]
    evals = [event for event in events if event["type"] == "eval"]
    ends = [event for event in events if event["type"] == "end"]
    tokens = sum(event["tokens"] for event in steps)
    seconds = sum(event["tokens"] / event["tokens_per_second"] for event in steps)
    return {
        "id": run_id,
        "status": status,
        "error": ends[-1].get("error") if ends else None,
        "model": spec.model.name,
        "data": spec.data.source,
        "method": spec.method_name,
        "steps": steps[-1]["step"] if steps else 0,
        "total_steps": start.get("total_steps"),
        "train_loss": steps[-1]["loss"] if steps else None,
        "eval_loss_before": evals[0]["eval_loss"] if evals else None,
        "eval_loss_after": evals[-1]["eval_loss"] if evals else None,
        "train_tokens": tokens,
        "train_seconds": seconds,
        "train_tokens_per_second": tokens / seconds if seconds else None,
        "planned_peak_bytes": start.get("planned_peak_bytes"),
        "planned_parts": start.get("planned_parts"),
        "measured_peak_bytes": max((event["peak_memory_bytes"] for event in steps), default=None),
        "loading_peak_bytes": start.get("loading_peak_bytes"),
        "micro_batch_size": start.get("micro_batch_size"),
        "accumulation": start.get("accumulation"),
        "checkpointed_layers": start.get("checkpointed_layers"),
        "processes": start.get("processes", 1),
        "trainable_parameters": start.get("trainable_parameters"),
        "total_parameters": start.get("total_parameters"),
        "started": events[0]["time"] if events else None,
        "ended": ends[-1]["time"] if ends else None,
    }


def last_step(events: list[Event]) -> int:
    return max((event["step"] for event in events if event["type"] == "train"), default=0)


def log_line(event: Event) -> str:
    """An event as a line of `log.txt`."""
    clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    fields = {key: value for key, value in event.items() if key not in ("time", "type")}
    if event["type"] in ("status", "warning"):
        return f"{clock} {'warning: ' if event['type'] == 'warning' else ''}{event['message']}"
    if event["type"] == "samples":
        fields["samples"] = len(fields["samples"])
    fields.pop("traceback", None)
    shown = "  ".join(
        f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in fields.items()
    )
    return f"{clock} {event['type']}: {shown}"


def _message(status: Status, events: list[Event]) -> str:
    """What to say of a run in one line."""
    last = events[-1] if events else None
    if status == "failed" and last is not None:
        return f"failed: {(last.get('error') or '').splitlines()[0] if last.get('error') else 'see the log'}"
    if status == "running" and last is not None and last["type"] == "status":
        return last["message"]
    return status
