"""Where MLflow keeps the runs, and whether it is there."""

from __future__ import annotations

import logging
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from nbtune.errors import RunError
from nbtune.spec import TrackingSpec

if TYPE_CHECKING:
    from mlflow import MlflowClient


def tracking_uri(tracking: TrackingSpec, runs_dir: Path) -> str:
    """The MLflow URI of a run: the one given, or a SQLite file in the runs folder, by its absolute path."""
    return tracking.tracking_uri or f"sqlite:///{(runs_dir / 'mlflow.db').resolve()}"


def require_reachable(uri: str, timeout: float = 3.0) -> None:
    """Raise RunError where `uri` is a server that does not answer within `timeout` seconds."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=timeout):  # noqa: S310 - checked above
            return
    except (urllib.error.URLError, OSError) as error:
        raise RunError(
            "The MLflow server does not answer",
            f"{uri}: {error}",
            "Start it, correct `tracking.tracking_uri`, or leave it out to log to a local file.",
        ) from error


def initialise(uri: str, runs_dir: Path) -> MlflowClient:
    """A client whose database exists. Two processes that create one SQLite file at once destroy it, hence the lock."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    for name in ("mlflow.store.db.utils", "alembic.runtime.migration"):
        logging.getLogger(name).setLevel(logging.WARNING)  # each table it creates is a line in the notebook
    runs_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(runs_dir / ".mlflow.lock"):
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)  # creates and migrates the tables
    return client


def experiment_id(client: MlflowClient, name: str, uri: str, runs_dir: Path) -> str:
    """The experiment of that name, made where there is none; its files lie beside the runs if the store is a file."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    location = (runs_dir / "mlartifacts" / name).resolve().as_uri() if uri.startswith("sqlite:") else None
    return client.create_experiment(name, artifact_location=location)
