"""MLflow follows the votes: one run "arena votes" for a folder of runs and a base model, never in the way of a page.

    tracker = VoteTracker(ballots, "smollm2-135m-instruct", run.spec.tracking, on_warning=print)
    ballots.add(vote)
    tracker.changed()
    tracker.close()

A metric's step is the number of votes. What MLflow misses is sent with a later vote, or by the next tracker.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from filelock import FileLock

from nbtune.compare.standings import standings
from nbtune.compare.votes import Ballots, Vote
from nbtune.spec import TrackingSpec
from nbtune.store import experiment_id, initialise, require_reachable, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

RUN_NAME = "arena votes"
COUNT = "votes"  # the metric that says how many votes MLflow has
POINTS = 100  # of a curve that are sent at once: what was missed for long is thinned
BATCH = 500  # metrics in one request; MLflow takes at most 1,000


class VoteTracker:
    """Reports the votes on one base model to MLflow from a daemon thread, until `close`.

    on_warning: told once, from that thread, where MLflow does not take them.
    """

    def __init__(
        self, ballots: Ballots, model: str, tracking: TrackingSpec | None = None, *, on_warning: Callable[[str], None]
    ) -> None:
        self._ballots, self._model = ballots, model
        self._tracking = tracking or TrackingSpec()
        self._folder = ballots.path.parent
        self._uri = tracking_uri(self._tracking, self._folder)
        self._client: MlflowClient | None = None
        self._on_warning = on_warning
        self._warned = False
        self._wake, self._closing = threading.Event(), threading.Event()
        self._wake.set()  # there may be votes that MLflow missed
        self._thread = threading.Thread(target=self._follow, name="nbtune-votes", daemon=True)
        self._thread.start()

    def changed(self) -> None:
        """Say that there is a new vote. Returns at once."""
        self._wake.set()

    def close(self, timeout: float = 30.0) -> None:
        """Send the rest; gives up, with a warning, after `timeout` seconds."""
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._warn("it did not take everything in time")

    def _follow(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            closing = self._closing.is_set()
            try:
                self._report()
            except Exception as error:  # noqa: BLE001 - whatever MLflow raises must not end the voting
                self._warn(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            if closing:
                return

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            self._on_warning(f"MLflow lacks votes ({reason}). {self._ballots.path} has them all.")

    def _report(self) -> None:
        votes = self._ballots.votes(model=self._model)
        if not votes:
            return
        require_reachable(self._uri)  # MLflow's own client would try for minutes
        client = self._client = self._client or initialise(self._uri, self._folder)
        with FileLock(self._folder / ".votes-mlflow.lock"):  # two pages on one folder share the run
            run_id, sent = self._run(client)
            if sent >= len(votes):
                return
            steps = sorted({len(votes) - index * (len(votes) - sent) // POINTS for index in range(POINTS)})
            metrics = [metric for step in steps for metric in _metrics(votes[:step])]
            for start in range(0, len(metrics), BATCH):
                client.log_batch(run_id, metrics=metrics[start : start + BATCH])
            client.log_artifact(run_id, str(self._ballots.path))
            client.set_terminated(run_id)  # complete, until the next vote

    def _run(self, client: MlflowClient) -> tuple[str, int]:
        """The MLflow run, and how many votes it has."""
        experiment = experiment_id(client, self._uri, self._folder, self._tracking.experiment)
        path = str(self._ballots.path.resolve())
        key = hashlib.sha256(f"{path}\n{self._model}".encode()).hexdigest()
        if found := client.search_runs([experiment], f"tags.`nbtune.votes` = '{key}'", max_results=1):
            return found[0].info.run_id, int(found[0].data.metrics.get(COUNT, 0))
        tags = {"nbtune.votes": key, "nbtune.votes.path": path, "nbtune.votes.model": self._model}
        return client.create_run(experiment, run_name=RUN_NAME, tags=tags).info.run_id, 0


def metric_name(column: str) -> str:
    """A column's name in the letters that MLflow takes; one that had to be changed ends in a digest of the original."""
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", column)[:100]
    if safe == column and safe.strip("."):
        return safe
    return f"{safe}-{hashlib.sha256(column.encode('utf-8', 'replace')).hexdigest()[:6]}"


def _metrics(votes: Sequence[Vote]) -> list[Metric]:
    """Where the columns stand after these votes. The count comes last: it says that the others were sent."""
    from mlflow.entities import Metric

    columns = list(dict.fromkeys(column for vote in votes for column in vote.columns))
    at, step = int(votes[-1].seconds * 1000), len(votes)  # ms
    values: dict[str, float] = {}
    for standing in standings(votes, columns):
        name = metric_name(standing.column)
        values[f"win_probability/{name}"] = standing.probability
        values[f"lower/{name}"] = standing.lower
        values[f"upper/{name}"] = standing.upper
        if standing.win_rate is not None:
            values[f"win_rate/{name}"] = standing.win_rate
    return [Metric(name, value, at, step) for name, value in {**values, COUNT: float(step)}.items()]
