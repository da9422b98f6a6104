"""MLflow has one run for the sweep, and the trials' runs are its children; never in the way of the trials.

A thread of its own tells the store: a slow or a lost server costs the trials nothing.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nbtune import _files
from nbtune.spec import TrackingSpec
from nbtune.store import experiment_id, initialise, require_reachable, tracking_uri
from nbtune.train.tracking import sync

FILE = "mlflow.json"
PARENT_TAG = "mlflow.parentRunId"


class SweepTracker:
    """The MLflow run of the sweep in a folder.

    `__init__` creates the database, before any trial could: two processes that create one file at once destroy it.
    Raises RunError where the server does not answer.
    """

    def __init__(
        self, path: Path, tracking: TrackingSpec, params: Mapping[str, Any], on_warning: Callable[[str], object]
    ) -> None:
        runs_dir = path / "runs"
        self._path = path
        self._uri = tracking_uri(tracking, runs_dir)
        require_reachable(self._uri)
        self._client = initialise(self._uri, runs_dir)
        self.run_id = self._opened(tracking.experiment, params)
        self._on_warning = on_warning
        self._adopted: set[Path] = set()
        self._wishes: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="nbtune-sweep-mlflow", daemon=True)
        self._thread.start()

    def adopt(self, run_path: Path) -> None:
        """Make a trial's run a child of the sweep's; what has no MLflow run yet is left for the next call."""
        if run_path not in self._adopted and (run_id := _run_id(run_path, self._uri)) is not None:
            self._adopted.add(run_path)
            self._wishes.put(lambda: self._client.set_tag(run_id, PARENT_TAG, self.run_id))

    def complete(self, run_path: Path, notebook: Path, *, tracked: bool) -> None:
        """Put a trial's executed notebook beside the other files of its run, which has ended.

        What another machine trained is not in a database of this one yet, and is sent there first, if it is `tracked`.
        """

        def send() -> None:
            if tracked and not (run_path / FILE).exists():
                sync(run_path)
            if (run_id := _run_id(run_path, self._uri)) is not None:
                self._client.set_tag(run_id, PARENT_TAG, self.run_id)
                if notebook.exists():
                    self._client.log_artifact(run_id, str(notebook))

        self._wishes.put(send)

    def abandon(self, run_path: Path) -> None:
        """Say of a run that was interrupted, and is done again from the beginning, that it ended."""
        if (run_id := _run_id(run_path, self._uri)) is not None:
            self._wishes.put(lambda: self._client.set_terminated(run_id, status="KILLED"))

    def close(self, status: str, metrics: Mapping[str, float], files: list[Path], timeout: float = 60.0) -> None:
        """Send the rest and end the sweep's run with `status`; gives up, with a warning, after `timeout` seconds."""

        def conclude() -> None:
            for name, value in metrics.items():
                self._client.log_metric(self.run_id, name, value)
            for file in files:
                self._client.log_artifact(self.run_id, str(file))
            self._client.set_terminated(self.run_id, status=status)

        self._wishes.put(conclude)
        self._wishes.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._on_warning("MLflow did not take everything in time; the sweep's folder has it all.")

    def _work(self) -> None:
        while (wish := self._wishes.get()) is not None:
            try:
                wish()
            except Exception as error:  # noqa: BLE001 - whatever MLflow raises must not end the sweep
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                self._on_warning(f"MLflow was not told everything ({reason}); the sweep's folder has it all.")

    def _opened(self, experiment: str, params: Mapping[str, Any]) -> str:
        file = self._path / FILE
        if file.exists():
            run_id = json.loads(file.read_text(encoding="utf-8"))["run_id"]
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        where = experiment_id(self._client, self._uri, self._path / "runs", experiment)
        tags = {"nbtune.sweep": str(self._path.resolve())}
        run_id = self._client.create_run(where, run_name=self._path.name, tags=tags).info.run_id
        _files.write_text(file, json.dumps({"tracking_uri": self._uri, "run_id": run_id}, indent=2) + "\n")
        for name, value in params.items():
            self._client.log_param(run_id, name, str(value)[:6000])  # MLflow's limit on a param's length
        return run_id


def _run_id(run_path: Path, uri: str) -> str | None:
    """The MLflow run of the run at `run_path`; None where it has none yet, or in another store."""
    file = run_path / FILE
    if not file.exists():
        return None
    known = json.loads(file.read_text(encoding="utf-8"))
    return known["run_id"] if known["tracking_uri"] == uri else None
