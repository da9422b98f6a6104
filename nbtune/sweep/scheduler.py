"""The body of a sweep: which trial is next, what became of those that run, all of it into the ledger.

Runs in the sweep's thread, which alone writes to the ledger.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path

from filelock import FileLock, Timeout

from nbtune import shelf
from nbtune._processes import kill_family
from nbtune.errors import SweepError
from nbtune.run import Run
from nbtune.spec import RunSpec, TrackingSpec
from nbtune.sweep.design import Design
from nbtune.sweep.halving import Halving
from nbtune.sweep.job import Ended, Executor, Job, lock_file, result_file
from nbtune.sweep.ledger import BEST, TABLE, Ledger, write_best, write_table
from nbtune.sweep.preview import Forecast, Forecaster
from nbtune.sweep.space import Point
from nbtune.sweep.tracking import FILE as MLFLOW
from nbtune.sweep.tracking import SweepTracker
from nbtune.sweep.trial import METRICS, UNSUCCESSFUL, State, Trial, best
from nbtune.sweep.wishes import Wishes

INTERVAL = 0.2  # seconds between two looks at the trials
ORDERS = "orders"  # the folder of those for other engines
GRACE = 120.0  # seconds that a run has to end after its step, and its notebook after it, once it was told to stop


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much of a sweep is done now; a later call may go further."""

    trials: int | None = None
    hours: float | None = None  # after which no trial starts; those that run go on
    timeout: float | None = None  # seconds for one trial, after which it is killed
    memory_bytes: int | None = None  # for one trial; None: its share of what is free
    retry: bool = False  # what failed, died or timed out before


@dataclasses.dataclass
class Running:
    """What is known of a trial while it runs."""

    began: float  # time.monotonic()
    run: Run | None = None  # the last that its notebook made, once there is one
    told: State | None = None  # what it was told: "stopped" or "stopped early", and what it will be called
    killed: State | None = None
    deadline: float | None = None  # time.monotonic() at which a trial that was told to stop is killed


class Scheduler:
    """One life of the sweep at `path`, until nothing is left to do or it is told to stop."""

    def __init__(
        self,
        path: Path,
        design: Design,
        budget: Budget,
        executor: Executor,
        wishes: Wishes,
        forecaster: Forecaster,
        *,
        halving: Halving | None = None,
        tracking: TrackingSpec | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.path = path
        self._design, self._budget, self._executor, self._wishes = design, budget, executor, wishes
        self._halving, self._tracking = halving, tracking
        self._ledger = Ledger(path)
        self._forecast = forecaster
        self._running: dict[int, Running] = {}
        self._tracker: SweepTracker | None = None
        self._specs: dict[int, RunSpec | None] = {}  # by trial
        self._cwd = cwd or Path.cwd()

    def live(self) -> None:
        """Do what is left of the sweep. Raises SweepError where its notebook makes no runs."""
        self._ledger.open()
        try:
            began = time.monotonic() - self._ledger.seconds()
            self._end_survivors()
            self._ledger.append("open")
            self._plan_points()
            self._tracker = self._track()
            self._take_in()
            self._catch_up()
            self._learn()
            while self._step(out_of_time=self._is_spent(began)):
                time.sleep(INTERVAL)
        finally:
            self._executor.close()
            self._conclude()

    def orders(self) -> list[Path]:
        """A file for each trial that waits, for `python -m nbtune.sweep.worker`; what they do, `live` takes in."""
        if self._design.adaptive:
            raise SweepError("A search chooses its trials from results", "", "Use sampler='grid' or 'random'.")
        self._ledger.open()
        try:
            self._ledger.append("open")
            self._plan_points()
            self._tracker = self._track()
            self._take_in()
            waiting = [trial for trial in self._trials().values() if trial.state == "waiting"]
            return [self._ordered(dataclasses.replace(trial, attempt=trial.attempt + 1)) for trial in waiting]
        finally:
            self._conclude()

    def _ordered(self, trial: Trial) -> Path:
        self._put_aside(trial)
        file = self._order_file(trial)
        file.parent.mkdir(exist_ok=True)
        self._job(trial).write(file)
        return file

    def _order_file(self, trial: Trial) -> Path:
        return self.path / ORDERS / f"{trial.name}.json"

    def _require_free(self, trial: Trial) -> None:
        """Raise SweepError where another engine is at a trial."""
        if not self._order_file(trial).exists():
            return
        try:
            with FileLock(lock_file(self._order_file(trial))).acquire(timeout=0):
                return
        except Timeout as error:
            raise SweepError(f"Trial {trial.number} runs elsewhere", "", "Wait for it, or end it there.") from error

    def _take_in(self) -> None:
        """Write down what other engines did of the orders that were written for them."""
        for trial in self._trials().values():
            result = result_file(self._order_file(trial))
            if trial.state == "waiting":
                self._require_free(trial)
            if trial.state == "waiting" and result.exists():
                ended = Ended.read(result, trial.name, code=None)
                self._ledger.append("start", trial=trial.number, attempt=trial.attempt + 1)
                self._running[trial.number] = Running(time.monotonic() - (ended.seconds or 0))
                self._record(ended)
            result.unlink(missing_ok=True)

    def _is_spent(self, began: float) -> bool:
        return self._budget.hours is not None and time.monotonic() - began > 3600 * self._budget.hours

    def _step(self, *, out_of_time: bool) -> bool:
        """Look at every trial once; whether there is more to do."""
        self._pass_warnings_on()
        if self._wishes.interrupted:
            return False
        for ended in self._executor.ended():
            self._record(ended)
        for number in list(self._running):
            self._look(self._trials()[number])
        for point in self._wishes.take_added():
            self._add(point)
        if not (self._wishes.stop_all or out_of_time):
            while self._executor.free and (trial := self._next()) is not None:
                self._start(trial)
        return bool(self._running)

    def _trials(self) -> dict[int, Trial]:
        return self._ledger.trials()

    def _plan_points(self) -> None:
        """Into the ledger with the points that are known beforehand; with what was unsuccessful, if that is wanted."""
        known = self._trials()
        self._specs = {trial.number: self._design.spec(trial.params) for trial in known.values()
                       if trial.state != "refused"}  # fmt: skip
        if self._budget.retry:
            for trial in known.values():
                if trial.state in UNSUCCESSFUL:
                    self._ledger.append("retry", trial=trial.number)
        tried = [trial.params for trial in known.values()]
        for point in self._design.points(self._budget.trials):
            if point not in tried:
                self._add(point)

    def _add(self, point: Point) -> Trial:
        number = len(self._trials()) + 1
        try:
            spec = self._design.spec(point)
            same = next((known for known, other in self._specs.items() if spec is not None and other == spec), None)
            forecast = self._forecast(spec) if same is None else Forecast(refused=f"the same as {same}")
            self._specs[number] = spec
        except SweepError as error:  # of a point that a sampler chose
            forecast = Forecast(refused=error.message)
        self._ledger.append(
            "trial",
            trial=number,
            params=point,
            predicted_seconds=forecast.seconds,
            predicted_bytes=forecast.peak_bytes,
            refused=forecast.refused,
        )
        return self._trials()[number]

    def _next(self) -> Trial | None:
        """The trial to start now; None where there is none."""
        while True:
            self._drop_stopped()
            trials = self._trials()
            waiting = next((trial for trial in trials.values() if trial.state == "waiting"), None)
            if waiting is not None or not self._design.adaptive or len(trials) >= (self._budget.trials or 0):
                return waiting
            tried = [(trial.params, trial.metrics.get(self._design.metric)) for trial in trials.values()]
            point = self._design.next_point(tried)
            if point is None:
                return None
            self._add(point)  # it may be refused; then the next one

    def _drop_stopped(self) -> None:
        """What somebody stopped while it waited is not started."""
        for trial in self._trials().values():
            if trial.state == "waiting" and trial.number in self._wishes.stopped:
                nothing = {"run_id": None, "metrics": {}, "error": None, "seconds": None}
                self._ledger.append("end", trial=trial.number, state="stopped", **nothing)

    def _start(self, trial: Trial) -> None:
        trial = dataclasses.replace(trial, attempt=trial.attempt + 1)
        self._put_aside(trial)
        facts = self._executor.start(self._job(trial))
        self._ledger.append("start", trial=trial.number, attempt=trial.attempt, **facts)
        self._running[trial.number] = Running(time.monotonic())

    def _job(self, trial: Trial) -> Job:
        runs_dir = self.path / "runs"
        parameters = self._design.parameters(trial.params)
        # A notebook that has places of its own for its runs is given those of the sweep.
        own = {"runs_dir": str(runs_dir), "run_id": f"{trial.run_prefix}-run"}
        parameters |= {n: value for n, value in own.items() if self._design.notebook.defaults.get(n) is not None}
        return Job(
            name=trial.name,
            notebook=self._design.notebook.path,
            output=trial.notebook,
            parameters=parameters,
            cwd=self._cwd,
            environment={"NBTUNE_RUNS": str(runs_dir), "NBTUNE_TRIAL": trial.run_prefix},
            log=trial.log,
            memory_bytes=trial.predicted_bytes,
        )

    def _put_aside(self, trial: Trial) -> None:
        """Make room for an attempt: the notebook of the one before is kept beside it, its runs go to the trash."""
        if trial.notebook.exists():
            trial.notebook.replace(self.path / f"{trial.name}.attempt-{trial.attempt - 1}.ipynb")
        for spec in sorted((self.path / "runs").glob(f"{trial.name}[-.]*/spec.yaml")):
            if self._tracker is not None and Run.at(spec.parent).status == "interrupted":
                self._tracker.abandon(spec.parent)
            shelf.discard(spec.parent)

    def _look(self, trial: Trial) -> None:
        """End a running trial whose time is over, or that somebody or its own loss says to stop."""
        running, now = self._running[trial.number], time.monotonic()
        if self._executor.waits(trial.name):
            running.began = now
        run = running.run = running.run or trial.run
        if run is not None and self._tracker is not None:
            self._tracker.adopt(run.path)
        if self._budget.timeout is not None and now - running.began > self._budget.timeout:
            self._kill(trial, "timed out")
        elif running.deadline is not None and now > running.deadline:
            self._kill(trial, running.told or "stopped")
        elif running.told is not None:
            return
        elif self._wishes.stop_all or trial.number in self._wishes.stopped:
            self._tell(trial, run, "stopped")
        elif run is not None and self._halving is not None and self._halving.falls_behind(trial.number, run.events()):
            self._tell(trial, run, "stopped early")

    def _tell(self, trial: Trial, run: Run | None, state: State) -> None:
        """Have a trial end after its step and keep its adapter; one that has no run yet has nothing to keep."""
        if run is None:
            self._kill(trial, state)
            return
        self._running[trial.number].told = state
        self._running[trial.number].deadline = time.monotonic() + GRACE
        run.stop()

    def _kill(self, trial: Trial, state: State) -> None:
        self._running[trial.number].killed = state
        self._executor.kill(trial.name)

    def _record(self, ended: Ended) -> None:
        """Write down how a trial ended."""
        trial = self._trials()[int(ended.name)]
        running = self._running.pop(trial.number)
        run = trial.run
        state, error = self._verdict(running, ended, run)
        if state == "timed out":
            self._mark(trial, f"Ended after {self._budget.timeout:g} s, its time limit.")
        summary = run.summary() if run is not None else {}
        self._ledger.append(
            "end",
            trial=trial.number,
            state=state,
            run_id=run.id if run is not None else None,
            metrics={name: summary[name] for name in METRICS if summary.get(name) is not None},
            error=error,
            seconds=round(time.monotonic() - running.began, 3),
        )
        if run is not None and self._tracker is not None:
            self._tracker.complete(run.path, trial.notebook, tracked=run.spec.tracking.mlflow)
        self._write_results()
        if ended.outcome == "finished" and run is None and not any(other.run_id for other in self._trials().values()):
            raise SweepError(f"{self._design.notebook.path.name} makes no runs", error or "", f"See {trial.notebook}.")

    def _verdict(self, running: Running, ended: Ended, run: Run | None) -> tuple[State, str | None]:
        if running.killed == "timed out":
            return "timed out", f"It took more than {self._budget.timeout:g} s."
        if running.killed is not None:
            return running.killed, None
        if ended.outcome != "finished":
            return ended.outcome, ended.error
        if run is None:
            return "failed", "Its last cell ended and no run was there. Let it call nbtune.train(...).wait()."
        if run.status == "stopped":
            return running.told or "stopped", None
        if run.status != "finished":
            return "failed", f"Its notebook ended while the run was {run.status}. Let it wait for the run."
        return "finished", None

    def _mark(self, trial: Trial, text: str) -> None:
        from nbtune.sweep.worker import mark

        mark(trial.notebook, text)

    def _end_survivors(self) -> None:
        """End the processes of a sweep that was killed; they do so by themselves, but may need a moment."""
        for event in self._ledger.events():
            if event["type"] == "start" and self._trials()[event["trial"]].state == "running" and "pid" in event:
                kill_family(event["pid"], created=event["created"])

    def _learn(self) -> None:
        """How earlier trials did at each rung counts for those to come."""
        for trial in self._trials().values():
            if self._halving is not None and trial.run_id is not None and trial.run is not None:
                self._halving.falls_behind(trial.number, trial.run.events())

    def _catch_up(self) -> None:
        """Tell MLflow what an earlier life of the sweep was killed before it could."""
        for trial in self._trials().values():
            if self._tracker is None or trial.run_id is None or (run := trial.run) is None:
                continue
            if run.spec.tracking.mlflow and not (run.path / MLFLOW).exists():
                self._tracker.complete(run.path, trial.notebook, tracked=True)
            else:
                self._tracker.adopt(run.path)

    def _track(self) -> SweepTracker | None:
        first = next((spec for spec in self._specs.values() if spec is not None), None)
        tracking = self._tracking or (first.tracking if first is not None else TrackingSpec())
        if not tracking.mlflow:
            return None
        params = {name: self._design.identity()[name] for name in ("space", "params", "sampler", "repeats", "metric")}
        return SweepTracker(self.path, tracking, params, self._wishes.warn)

    def _write_results(self) -> None:
        trials = list(self._trials().values())
        write_table(self.path, trials)
        leader = best(trials, self._design.metric, maximise=self._design.maximise)
        if leader is not None:
            write_best(self.path, leader, self._design.metric)

    def _pass_warnings_on(self) -> None:
        for message in self._wishes.take_warnings():
            self._ledger.append("warning", message=message)

    def _conclude(self) -> None:
        trials = self._trials()
        self._write_results()
        if self._tracker is not None:
            leader = best(trials.values(), self._design.metric, maximise=self._design.maximise)
            metrics = {self._design.metric: leader.metrics[self._design.metric]} if leader is not None else {}
            files = [file for name in (TABLE, BEST) if (file := self.path / name).exists()]
            done = all(trial.state not in ("waiting", "running") for trial in trials.values())
            self._tracker.close("FINISHED" if done else "KILLED", metrics, files)
        self._pass_warnings_on()
        self._ledger.append("close")
        self._ledger.close()
        shutil.rmtree(self.path / ".jobs", ignore_errors=True)
