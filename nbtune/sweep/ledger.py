"""`trials.jsonl`: what happened in a sweep, one JSON object a line, only ever appended to; all else is made from it.

| event | fields besides `time` (unix seconds) |
|---|---|
| `open` | `pid`, `host`: a process took the sweep; what was running before was interrupted |
| `trial` | `trial`, `params`, `predicted_seconds`, `predicted_bytes`, `refused`: a reason, or "" |
| `start` | `trial`, `attempt`, and what its executor says of it: `pid`, `created` |
| `retry` | `trial`: it waits for another attempt |
| `warning` | `message` |
| `end` | `trial`, `state`, `run_id`, `metrics`, `error`, `seconds` |
| `close` | `seconds`: how long this process had it |
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nbtune import _files
from nbtune.sweep.trial import METRICS, Trial, fold
from nbtune.train.events import Event, EventLog, EventReader

FILE = "trials.jsonl"
TABLE = "table.csv"
BEST = "best.json"
BEST_LINK = "best"


class Ledger:
    """Reads the ledger of the sweep in a folder, and writes it once `open` was called."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = EventReader(path, file=FILE)
        self._log: EventLog | None = None

    def open(self) -> None:
        self._log = EventLog(self.path, file=FILE)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def append(self, type: str, **fields: Any) -> Event:
        assert self._log is not None, "the ledger is not open"
        return self._log.append({"type": type, **fields})

    def events(self) -> list[Event]:
        return self._reader.read()

    def trials(self) -> dict[int, Trial]:
        return fold(self.path, self.events())

    def seconds(self) -> float:
        """How long processes had the sweep; of one that was killed, until its last event."""
        total, began, last = 0.0, None, 0.0
        for event in self.events():
            if event["type"] == "open":
                total += last - began if began is not None else 0.0
                began = event["time"]
            last = event["time"]
        return total + (last - began if began is not None else 0.0)


def write_table(path: Path, trials: Sequence[Trial]) -> None:
    """`table.csv`: a line a trial, its settings, how it stands, its metrics, its run."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", *names, "state", *METRICS, "seconds", "attempts", "run", "notebook", "error"])
    for trial in trials:
        writer.writerow(
            [
                trial.number,
                *(trial.params.get(name) for name in names),
                trial.state,
                *(trial.metrics.get(name) for name in METRICS),
                trial.seconds,
                trial.attempt,
                trial.run_id,
                trial.notebook.name if trial.notebook.exists() else None,
                (trial.error or "").replace("\n", " "),
            ]
        )
    _files.write_text(path / TABLE, text.getvalue())


def write_best(path: Path, trial: Trial, metric: str) -> None:
    """`best.json`, and the link `best` to the adapter (or model) of the best run, by a relative path."""
    run = path / "runs" / str(trial.run_id)
    result = next((run / name for name in ("adapter", "model") if (run / name).exists()), None)
    told = {
        "trial": trial.number,
        "run": trial.run_id,
        "params": trial.params,
        metric: trial.metrics[metric],
        "result": str(result.relative_to(path)) if result is not None else None,
    }
    _files.write_text(path / BEST, json.dumps(told, indent=2) + "\n")
    if result is not None and os.name == "posix":  # elsewhere a link takes a privilege; best.json says the same
        link = Path(tempfile.mkdtemp(dir=path, prefix=".best.")) / BEST_LINK
        link.symlink_to(result.relative_to(path))
        link.replace(path / BEST_LINK)
        link.parent.rmdir()
