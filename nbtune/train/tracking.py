"""MLflow follows a run: its params, metrics, data, adapter and files, never in the way of training.

A thread of its own reads the run's folder and reports what is new, so a slow or a lost server costs the training
nothing. How far it came is kept in `mlflow.json`; what a server missed is sent when the run is resumed, or by `sync`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbtune import _files
from nbtune.errors import RunError
from nbtune.shelf import FILE as ABOUT
from nbtune.shelf import read_about
from nbtune.spec import RunSpec
from nbtune.store import experiment_id, initialise, require_reachable, tracking_uri
from nbtune.train.events import Event, read_events

if TYPE_CHECKING:
    from mlflow import MlflowClient

METRICS = {
    "start": ("planned_peak_bytes",),
    "train": (
        *("loss", "mean_token_accuracy", "entropy", "learning_rate", "grad_norm"),
        *("tokens_per_second", "memory_bytes", "peak_memory_bytes", "epoch"),
    ),
    "eval": ("eval_loss", "eval_mean_token_accuracy"),
}
ARTIFACTS = ("spec.yaml", "summary.json", "log.txt", "adapter")
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
BATCH = 500  # metrics in one request; MLflow takes at most 1,000


class MlflowFollower:
    """Reports one run's folder to MLflow from a daemon thread, until `close`."""

    def __init__(self, path: Path, spec: RunSpec, *, interval: float = 2.0, on_warning: Callable[[str], None]) -> None:
        self._reporter = _Reporter(path, spec)
        self._interval = interval
        self._on_warning = on_warning
        self._closing = threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._follow, name="nbtune-mlflow", daemon=True)
        self._thread.start()

    def close(self, timeout: float = 60.0) -> None:
        """Send the rest and end the MLflow run; gives up, with a warning, after `timeout` seconds."""
        self._closing.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._warn("MLflow did not take everything in time")

    def _follow(self) -> None:
        while True:
            closing = self._closing.wait(self._interval)
            try:
                self._reporter.report(final=closing)
            except Exception as error:  # noqa: BLE001 - whatever MLflow raises must not end the training
                self._warn(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            if closing:
                return

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            self._on_warning(
                f"MLflow is behind ({reason}). Training goes on and the run's folder has everything; "
                f"`nbtune sync {self._reporter.path.name}` sends the rest."
            )


def sync(path: Path) -> str:
    """Send to MLflow whatever it lacks of the run at `path`; returns the MLflow run id."""
    reporter = _Reporter(path, RunSpec.from_yaml(path / "spec.yaml"))
    reporter.report(final=True)
    return reporter.run_id


def log_artifact(path: Path, file: Path) -> None:
    """Attach `file` (the executed notebook, say) to the MLflow run of the run at `path`."""
    reporter = _Reporter(path, RunSpec.from_yaml(path / "spec.yaml"))
    reporter.client.log_artifact(reporter.run_id, str(file))


def send_about(path: Path) -> None:
    """Give the MLflow run the label and the note of the run at `path`.

    Raises RunError where MLflow does not take them; the run's folder has them, and `sync` sends them later.
    """
    try:
        _Reporter(path, RunSpec.from_yaml(path / "spec.yaml")).report_about()
    except Exception as error:
        message = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        remedy = f"It is kept here; `nbtune sync {path.name}` sends it."
        raise RunError("MLflow was not told", message, remedy) from error


class _Reporter:
    """What MLflow has of one run, and the rest of it."""

    def __init__(self, path: Path, spec: RunSpec) -> None:
        self.path = path
        self._spec = spec
        self._state_file = path / "mlflow.json"
        self._client: MlflowClient | None = None
        known = json.loads(self._state_file.read_text(encoding="utf-8")) if self._state_file.exists() else {}
        self._uri: str = known.get("tracking_uri") or tracking_uri(spec.tracking, path.parent)
        self._run_id: str | None = known.get("run_id")
        self._reported: int = known.get("reported_events", 0)
        self._data_reported: bool = known.get("data_reported", False)

    @property
    def client(self) -> MlflowClient:
        if self._client is None:
            self._client = initialise(self._uri, self.path.parent)
        return self._client

    @property
    def run_id(self) -> str:
        """The MLflow run, created when first asked for and the same for the whole life of the folder."""
        if self._run_id is None:
            self._run_id = self._create_run()
            self._save()
        return self._run_id

    def report(self, *, final: bool) -> None:
        """Send the events that are new; with `final` also the files and the status."""
        run_id = self.run_id
        events = read_events(self.path, all_lives=True)
        new = events[self._reported :]
        if any(event["type"] == "resume" for event in new):
            self.client.update_run(run_id, status="RUNNING")
        for event in new:
            if event["type"] == "start" and not self._data_reported:
                self._report_data(event)
        metrics = [metric for event in new for metric in _metrics(event)]
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(run_id, metrics=metrics[start : start + BATCH])
        self._reported = len(events)
        self._save()
        if final:
            self._report_end(events)

    def report_about(self) -> None:
        """Send the label and the note that a person gave the run."""
        about = read_about(self.path)
        require_reachable(self._uri)  # MLflow's own client would try for minutes
        self.client.update_run(self.run_id, name=about.label or self.path.name)
        self.client.set_tag(self.run_id, "mlflow.note.content", about.note)

    def _create_run(self) -> str:
        client = self.client
        experiment = experiment_id(client, self._spec.tracking.experiment, self._uri, self.path.parent)
        run = client.create_run(experiment, run_name=self.path.name, tags={"nbtune.run": str(self.path.resolve())})
        for key, value in flat_params(self._spec).items():
            client.log_param(run.info.run_id, key, value)
        return run.info.run_id

    def _report_data(self, start: Event) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = self._spec.data
        digest = start.get("data_fingerprint") or hashlib.sha256(data.source.encode()).hexdigest()
        inputs = [
            DatasetInput(
                Dataset(
                    name=f"{data.source}:{part}",  # MLflow takes one name and digest for one dataset
                    digest=digest[:36],
                    source_type="nbtune",
                    source=json.dumps(data.model_dump(mode="json")),
                    profile=json.dumps({"examples": start[f"{part}_examples"]}),
                ),
                [InputTag("mlflow.data.context", context)],
            )
            for part, context in (("train", "training"), ("eval", "evaluation"))
            if start.get(f"{part}_examples")
        ]
        self.client.log_inputs(self.run_id, inputs)
        self._data_reported = True

    def _report_end(self, events: list[Event]) -> None:
        ended = events[-1]["status"] if events and events[-1]["type"] == "end" else "failed"
        for name in ARTIFACTS:
            file = self.path / name
            if file.is_dir():
                self.client.log_artifacts(self.run_id, str(file), artifact_path=name)
            elif file.exists():
                self.client.log_artifact(self.run_id, str(file))
        # The notebook of this kernel, as Jupyter last saved it; what papermill executes is attached by its caller.
        notebook = Path(os.environ.get("JPY_SESSION_NAME", ""))
        if notebook.suffix == ".ipynb" and notebook.is_file():
            self.client.log_artifact(self.run_id, str(notebook))
        if (self.path / ABOUT).exists():
            self.report_about()
        self.client.set_terminated(self.run_id, status=STATUS[ended])

    def _save(self) -> None:
        state: dict[str, Any] = {
            "tracking_uri": self._uri,
            "run_id": self._run_id,
            "reported_events": self._reported,
            "data_reported": self._data_reported,
        }
        _files.write_text(self._state_file, json.dumps(state, indent=2) + "\n")


def flat_params(spec: RunSpec) -> dict[str, str]:
    """The spec as MLflow params: `training.learning_rate` -> `"0.0002"`; settings left at None are left out."""
    params: dict[str, str] = {}
    for part, values in spec.to_dict().items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            if value is not None:
                params[f"{part}.{key}".rstrip(".")] = str(value)[:6000]  # MLflow's limit on a param's length
    return params


def _metrics(event: Event) -> list[Any]:
    """The event's numbers as MLflow metrics. Infinity and NaN are left out: MLflow stores them as other numbers."""
    from mlflow.entities import Metric

    timestamp = int(event.get("time", time.time()) * 1000)  # ms
    return [
        Metric(name, float(event[name]), timestamp, event["step"])
        for name in METRICS.get(event["type"], ())
        if name in event and math.isfinite(event[name])
    ]
