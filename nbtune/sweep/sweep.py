"""A sweep: a notebook executed once per trial, each trial a process and a report of its own.

    sweep = nt.sweep("notebooks/train.ipynb", {"r": [4, 8], "learning_rate": nt.Range(1e-4, 1e-3, n=3, log=True)})
    sweep.watch()
    sweep.best.run.summary()["eval_loss_after"]

    sweeps/<id>/  sweep.json  notebook.ipynb  trials.jsonl  table.csv  best.json  best  001.ipynb ...  runs/<run>/ ...

The folder is the truth: the same call, after whatever ended it, does what is left and repeats nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from nbtune import _files
from nbtune.errors import SweepError, told
from nbtune.spec import TrackingSpec
from nbtune.sweep.cluster import Cluster, RayExecutor, look, require_ray
from nbtune.sweep.design import Design
from nbtune.sweep.halving import Halving
from nbtune.sweep.job import Executor
from nbtune.sweep.ledger import FILE, Ledger
from nbtune.sweep.local import LocalExecutor, visible_gpus
from nbtune.sweep.notebook import SweepNotebook
from nbtune.sweep.preview import Forecaster, Preview
from nbtune.sweep.scheduler import Budget, Scheduler
from nbtune.sweep.space import Space
from nbtune.sweep.together import Together, TogetherScheduler, foretell
from nbtune.sweep.trial import UNSUCCESSFUL, Trial, best, find, interrupted
from nbtune.sweep.wishes import Wishes
from nbtune.train.control import leave_wish
from nbtune.train.events import Event

if TYPE_CHECKING:
    from rich.console import Console

IDENTITY = "sweep.json"
NOTEBOOK = "notebook.ipynb"
Status = Literal["created", "running", "finished", "stopped", "failed", "interrupted"]


def sweep(
    notebook: str | Path,
    space: Space,
    *,
    params: Mapping[str, Any] | None = None,
    sampler: str = "grid",
    trials: int | None = None,
    repeats: int = 1,
    seed: int = 0,
    metric: str = "eval_loss_after",
    maximise: bool = False,
    hours: float | None = None,
    timeout: float | None = None,
    jobs: int = 1,
    gpus: list[str] | None = None,
    ray: str | None = None,
    memory_bytes: int | None = None,
    halving: Halving | None = None,
    retry: bool = False,
    together: Together = False,
    tracking: TrackingSpec | None = None,
    out: str | Path | None = None,
    start: bool = True,
) -> Sweep:
    """Start a sweep in a daemon thread of this process and return it; `watch` or `wait` for its end.

    Called again after it was interrupted, it does what is missing; once all is done, it returns the results.

    Args:
        notebook: A notebook with one cell of parameters, such as `notebooks/train.ipynb`.
        space: For each name a list of values or a `Range`. Names are those of the notebook's parameters and of the
            settings of a run.
        params: Values that are the same in all trials.
        sampler: `grid`, `random`, or `tpe` and `gp`, which learn from the trials that ended.
        trials: How many there are to be at most.
        repeats: How often each point is tried, each time with another `seed`.
        seed: Of random points, and the first one of repeats.
        metric: The number of a run's summary by which trials are compared.
        maximise: More of the metric is better; else less.
        hours: After which no trial starts; those that run go on to their end.
        timeout: Seconds after which a trial is killed.
        jobs: How many trials run at a time, each with its share of the threads and the GPUs.
        gpus: The GPUs to use, as `CUDA_VISIBLE_DEVICES` names them; None is all.
        ray: Run trials on Ray: on the cluster that this machine is part of ("auto"), on the one at this address, or on
            one that is started here and ends with the sweep ("local").
        memory_bytes: What one trial may take; None is its share of what is free. Larger ones are refused.
        halving: Stops trials early that fall behind others.
        retry: Also do again what failed, died or timed out.
        together: Train trials that share a base model in one process on one base; "auto" where the plan says that this
            is faster.
        tracking: Where the sweep's own record is kept; None is where its first trial's is.
        out: The sweep's folder; None is `sweeps/<notebook>-<a digest of what is asked>`.
        start: False returns it before it starts, so that its `preview` can be looked at.

    Raises NbtuneError, naming what is wrong and what to do, before anything runs.
    """
    design = Design(
        SweepNotebook(Path(notebook)), space, dict(params or {}), sampler, repeats, seed, metric, maximise=maximise
    )
    path = (Path(out) if out is not None else design.default_folder()).resolve()
    budget = Budget(trials, hours, timeout, memory_bytes, retry=retry)
    made = Sweep(
        path, design, budget, jobs=jobs, gpus=gpus, ray=ray, halving=halving, tracking=tracking, together=together
    )
    made.require()
    if start:
        made.start()
    return made


class Sweep:
    """One sweep, live or finished."""

    def __init__(
        self,
        path: Path,
        design: Design,
        budget: Budget | None = None,
        *,
        jobs: int = 1,
        gpus: list[str] | None = None,
        ray: str | None = None,
        halving: Halving | None = None,
        tracking: TrackingSpec | None = None,
        together: Together = False,
    ) -> None:
        self.path = path.resolve()
        self.design = design
        self.jobs = jobs
        self._budget = budget or Budget()
        self.ray = ray
        self._gpus = gpus
        self._halving = halving
        self._tracking = tracking
        self._together: Together = together
        self._ledger = Ledger(self.path)
        self._wishes = Wishes(self.path)
        self._thread: threading.Thread | None = None
        self._exception: BaseException | None = None

    @classmethod
    def open(cls, path: str | Path, **options: Any) -> Sweep:
        """The sweep in a folder, to be looked at, stopped, or started again; `options` are `budget`, `jobs`, ...

        Raises SweepError where there is none.
        """
        path = Path(path)
        file = path / IDENTITY
        if not file.exists():
            raise SweepError(f"There is no sweep in {path}", "", "Name the folder of one: sweeps/<id>.")
        return cls(path, Design.of_identity(json.loads(file.read_text(encoding="utf-8")), path / NOTEBOOK), **options)

    def __repr__(self) -> str:
        return f"Sweep({self.id!r}, {self.status}, {self.sentence()})"

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def trials(self) -> list[Trial]:
        """All trials as they stand now, by number."""
        return list(self._by_number().values())

    def trial(self, number: int) -> Trial:
        return find(self._by_number(), number)

    def _by_number(self) -> dict[int, Trial]:
        trials = self._ledger.trials()
        return trials if self._is_alive() else interrupted(trials)

    @property
    def best(self) -> Trial | None:
        """The best trial so far; None where no run has the metric yet."""
        return best(self.trials, self.design.metric, maximise=self.design.maximise)

    @property
    def forecaster(self) -> Forecaster:
        """What plans its trials, for the memory that each may take; it keeps what it planned."""
        return self._forecaster

    @property
    def to_come(self) -> int:
        """How many trials there will be beside `trials`: those that a sampler chooses as results come in."""
        return max(0, (self._budget.trials or 0) - len(self.trials)) if self.design.adaptive else 0

    @property
    def preview(self) -> Preview:
        """All trials, with the time and the memory that each will take."""
        return self.design.preview(self._forecaster, trials=self._budget.trials, jobs=self.jobs)

    def grouping(self) -> str:
        """How the known trials are trained together, and what that saves; "" where each is trained by itself."""
        specs = [self.design.spec(point) for point in self.design.points(self._budget.trials)]
        known = [spec for spec in specs if spec is not None]
        return foretell(known, self._memory()) if self._together and known else ""

    @functools.cached_property
    def _forecaster(self) -> Forecaster:
        return Forecaster(self._memory())

    @property
    def status(self) -> Status:
        if self._is_alive():
            return "running"
        if self._exception is not None:
            return "failed"
        events = self.events()
        if not events:
            return "created"
        if any(trial.state == "waiting" for trial in self.trials):
            return "stopped" if events[-1]["type"] == "close" else "interrupted"
        return "finished"

    @property
    def error(self) -> str | None:
        """What ended the sweep itself, in words for a person; None where nothing did. Trials have their own."""
        return told(self._exception) if self._exception is not None else None

    def events(self) -> list[Event]:
        """What happened so far; see `nbtune.sweep.ledger` for the fields."""
        return self._ledger.events()

    def sentence(self) -> str:
        """How many trials there are of each state, in words."""
        states = [trial.state for trial in self.trials]
        return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "no trials yet"

    def require(self) -> None:
        """Raise NbtuneError where the sweep cannot be started: what its trials would fail of, another in its folder."""
        LocalExecutor(self.jobs, self.path, self._gpus or [])
        if self.ray is not None:
            require_ray(self.ray, self._gpus)
            if self._together:
                message = "Trials are trained together in one process of this machine."
                raise SweepError("together and ray exclude each other", message, "Leave one of them out.")
        self._require_own_folder()
        if self.status != "finished" or self._has_more():
            self.design.require(self._budget.trials, self.path / "runs")
            self.preview  # noqa: B018 - raises where no trial fits

    def start(self) -> Sweep:
        """Do what is left, in a daemon thread of this process; nothing where nothing is.

        Raises SweepError where a process does so already.
        """
        if self.status == "finished" and not self._has_more():
            return self
        lock = self._taken()
        self._exception = None
        self._wishes.go_on()
        self._thread = threading.Thread(target=self._live, args=(lock,), name=f"nbtune-{self.id}", daemon=True)
        self._thread.start()
        return self

    def commands(self) -> list[str]:
        """A command of a shell for each trial that waits: for any engine to run, in any order, where this folder is.

        The same call takes in what they did, and does what is left. Raises SweepError where a process is at it.
        """
        lock = self._taken()
        try:
            words = (sys.executable, "-P", "-m", "nbtune.sweep.worker", "--alone")
            return [
                shlex.join([*words, str(file)]) for file in self._scheduler(LocalExecutor(1, self.path, [])).orders()
            ]
        finally:
            lock.release()

    def stop(self, trial: int | Trial | None = None) -> None:
        """Have one trial, or all, end after the step in progress; adapters are kept.

        A trial that has no run yet is killed. What waits is left for the next call.
        """
        alive = self._thread is not None and self._thread.is_alive()
        if trial is None:
            self._wishes.stop() if alive else leave_wish(self.path, "stop")
            return
        found = find(self._by_number(), trial)
        if alive:
            self._wishes.stopped.add(found.number)
        elif found.run is not None:
            found.run.stop()

    def interrupt(self) -> None:
        """End the sweep now. Trials that run are killed, and done again by the same call."""
        self._wishes.interrupted = True

    def add(self, **point: Any) -> None:
        """One more trial, with these settings. Raises NbtuneError where the notebook does not take them."""
        self.design.spec(point)
        self.design.parameters(point)
        self._wishes.add(point)

    def wait(self, timeout: float | None = None) -> Sweep:
        """Block until the sweep ends; re-raise what ended it. Trials that failed raise nothing: see `trials`.

        Raises TimeoutError after `timeout` seconds; the sweep goes on.
        """
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise TimeoutError(f"{self.id} is still running after {timeout} s")
        if self._exception is not None:
            raise self._exception
        return self

    def watch(self, console: Console | None = None) -> Sweep:
        """Show the trials as they go on until the sweep ends; an interrupt ends it, and the same call goes on.

        In a notebook this is the leaderboard, in a terminal a table on `console`.
        """
        from nbtune_widgets import in_kernel, watch_sweep

        if console is None and in_kernel():
            watch_sweep(self)
        else:
            from nbtune.sweep.terminal import watch

            watch(self, console)
        return self.wait()

    async def watch_async(self) -> Sweep:
        """As `watch` in a notebook, but awaited: the leaderboard's buttons work while the cell runs."""
        from nbtune_widgets import watch_sweep_async

        await watch_sweep_async(self)
        return self.wait()

    def show(self) -> None:
        """Show the leaderboard in this cell and return at once; it follows the sweep. In a terminal a line of text."""
        from nbtune_widgets import show_sweep

        show_sweep(self)

    def _ipython_display_(self) -> None:
        self.show()

    def _taken(self) -> FileLock:
        """Make the folder this sweep's. Returns its lock, held."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock", thread_local=False)
        try:
            lock.acquire(timeout=1)  # whoever looks whether it runs holds it for a moment
        except Timeout as error:
            raise SweepError(f"{self.id} is running already", str(self.path), "Stop it, or wait for it.") from error
        try:
            self._require_own_folder()
            self._settle()
        except BaseException:
            lock.release()
            raise
        return lock

    def _scheduler(self, executor: Executor) -> Scheduler:
        kind = Scheduler
        if self._together:
            kind = functools.partial(TogetherScheduler, together=self._together, memory_bytes=self._memory())
        return kind(
            self.path,
            self.design,
            self._budget,
            executor,
            self._wishes,
            self._forecaster,
            halving=self._halving,
            tracking=self._tracking,
            cwd=self._cwd(),
        )

    def _live(self, lock: FileLock) -> None:
        """The body of the sweep's thread."""
        try:
            self._scheduler(self._executor()).live()
        except OSError as error:
            self._exception = SweepError(f"{self.id} could not go on", str(error), "Mend that; the same call goes on.")
        except BaseException as error:  # noqa: BLE001 - kept, and raised again by wait()
            self._exception = error
        finally:
            lock.release()

    def _cwd(self) -> Path:
        """Where trials run: where the sweep was first called, for its relative paths; here, where that is gone."""
        told = json.loads((self.path / IDENTITY).read_text(encoding="utf-8"))
        first = Path(told.get("cwd", ""))
        return first if first.is_absolute() and first.is_dir() else Path.cwd()

    def _executor(self) -> Executor:
        if self.ray is not None:
            return RayExecutor(self.ray, self.jobs, self.path, self._gpus)
        return LocalExecutor(self.jobs, self.path / ".jobs", self._gpus)

    def _has_more(self) -> bool:
        """Whether there are trials to do of a sweep whose trials have all ended: a larger budget, added points."""
        trials, budget = self.trials, self._budget
        if self._wishes.has_added() or (budget.retry and any(trial.state in UNSUCCESSFUL for trial in trials)):
            return True
        if self.design.adaptive:
            return len(trials) < (budget.trials or 0)
        known = [trial.params for trial in trials]
        return any(point not in known for point in self.design.points(budget.trials))

    def _settle(self) -> None:
        """Write down what the sweep is, once; from then on it executes its own copy of the notebook."""
        copy = self.path / NOTEBOOK
        if not copy.exists():
            with _files.atomic_file(copy) as file:
                shutil.copyfile(self.design.notebook.path, file)
        if not (self.path / IDENTITY).exists():
            told = {**self.design.identity(), "cwd": str(Path.cwd())}
            _files.write_text(self.path / IDENTITY, json.dumps(told, indent=2) + "\n")
        self.design = dataclasses.replace(self.design, notebook=SweepNotebook(copy))

    def _require_own_folder(self) -> None:
        """Raise SweepError where another sweep, or something else, is in the folder."""
        file = self.path / IDENTITY
        if file.exists():
            known, asked = json.loads(file.read_text(encoding="utf-8")), self.design.identity()
            other = [name for name in asked if known.get(name) != asked[name]]
            if other:
                raise SweepError(
                    f"Another sweep is in {self.path}", f"It has another {', '.join(other)}.", "Choose another folder."
                )
        elif self.path.exists() and any(entry.name not in (".lock", NOTEBOOK) for entry in self.path.iterdir()):
            raise SweepError(f"{self.path} is not empty", "It holds no sweep.", "Choose another folder.")

    def _memory(self) -> int | None:
        """Bytes that one trial may take; None for a notebook whose trials cannot be planned."""
        if self._budget.memory_bytes is not None or not self.design.notebook.is_of_a_run:
            return self._budget.memory_bytes
        if self._cluster is not None:
            return self._cluster.memory_bytes or sys.maxsize
        from nbtune.models import available_memory, default_device

        gpus = len(visible_gpus() if self._gpus is None else self._gpus) if default_device().type == "cuda" else 1
        return available_memory(default_device()) // -(-self.jobs // gpus)

    @functools.cached_property
    def _cluster(self) -> Cluster | None:
        """The machines of the cluster; None where trials run on this one."""
        return look(self.ray) if self.ray not in (None, "local") else None

    def _is_alive(self) -> bool:
        """Whether a thread of this process or another process is at it."""
        if self._thread is not None and self._thread.is_alive():
            return True
        if not (self.path / FILE).exists():
            return False
        try:
            with FileLock(self.path / ".lock", thread_local=False).acquire(timeout=0):
                return False
        except Timeout:
            return True
