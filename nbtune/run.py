"""A run: one folder, one thread, its events and its controls.

    run = train(RunSpec(model="smollm2-135m-instruct", data="stdlib-docs"))
    run.watch()          # live charts until it ends
    run.summary()["eval_loss_after"]

    run.pause(); run.resume(); run.stop()
    runs()               # in a notebook: all of them, to compare, name and throw away

    runs/<id>/  spec.yaml  events.jsonl  log.txt  checkpoints/  adapter/  summary.json  about.json

The folder is the truth: a run that a kernel lost is opened again from it (`Run.open`) and goes on from its last
checkpoint (`resume`).
"""

from __future__ import annotations

import json
import re
import threading
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout

from nbtune import _files, shelf
from nbtune._names import new_id
from nbtune.check import require
from nbtune.errors import RunError, told
from nbtune.models.trained import default_runs_dir
from nbtune.shelf import About
from nbtune.spec import RunSpec
from nbtune.train.control import Control, Wish, leave_wish
from nbtune.train.digest import Journal, Progress, Status, last_step, living, progress, summarise
from nbtune.train.events import Event, EventReader
from nbtune.train.handover import handed_over

if TYPE_CHECKING:
    from nbtune.train.world import World

_training: dict[Path, Run] = {}  # the runs of this process that have a thread


def train(
    spec: RunSpec, *, runs_dir: str | Path | None = None, run_id: str | None = None, ray: str | None = None
) -> Run:
    """Start a run in a daemon thread of this process and return it.

    Args:
        spec: What to train, on what, how.
        runs_dir: The folder of runs; None is `default_runs_dir()`.
        run_id: The name of the run's folder; None chooses one.
        ray: Where the Ray is whose workers train: an address, "auto", or "local" for one that is started for the run.
            Its machines must all see the folder of the runs.

    In a trial of a sweep that was trained together with others it is the run that was trained for it.

    Raises NbtuneError, naming what is wrong and what to do, before anything is written: see `nbtune.check`.
    """
    if (trained := handed_over(spec)) is not None:
        return Run.at(trained)
    # Where there is room for processes, Ray knows.
    require(spec if ray is None else spec.updated(num_processes=1), runs_dir=_folder(runs_dir, run_id))
    run = Run.create(spec, runs_dir=runs_dir, run_id=run_id)
    run._start(ray=ray)
    return run


def _folder(runs_dir: str | Path | None, run_id: str | None) -> Path:
    """The folder of runs. Raises RunError where `run_id` cannot be the name of a new one there."""
    folder = (Path(runs_dir) if runs_dir is not None else default_runs_dir()).resolve()
    if run_id is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", run_id):
        raise RunError(f"{run_id!r} cannot name a run", "", "Use letters, digits, '-', '_' and '.'.")
    if run_id is not None and (folder / run_id).exists():
        raise RunError(f"There is a run {run_id} already", str(folder / run_id), "Choose another name, or resume it.")
    return folder


class Runs(list["Run"]):
    """The runs of a folder in a list, which a notebook shows as a table to sort, compare, name and throw away."""

    def __init__(self, found: Iterable[Run], folder: Path) -> None:
        super().__init__(found)
        self.folder = folder

    def show(self) -> None:
        """Display the table in this cell."""
        from nbtune_widgets import show_runs

        show_runs(self.folder)

    def _ipython_display_(self) -> None:
        self.show()


def runs(runs_dir: str | Path | None = None) -> Runs:
    """The runs in a folder, newest first. In a notebook they are shown as a table."""
    folder = Path(runs_dir) if runs_dir is not None else default_runs_dir()
    found = [Run.at(path) for path in folder.glob("*/") if _is_run(path) and not path.name.startswith(".")]
    return Runs(sorted(found, key=lambda run: run.id, reverse=True), folder.resolve())


def _is_run(path: Path) -> bool:
    return (path / "spec.yaml").exists()


class Run:
    """One run, live or finished."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.spec = RunSpec.from_yaml(self.path / "spec.yaml")
        self._control = Control(self.path, passes_on=self.spec.training.num_processes > 1)
        self._thread: threading.Thread | None = None
        self._exception: BaseException | None = None
        self._events = EventReader(self.path)

    @classmethod
    def at(cls, path: Path) -> Run:
        """The run in a folder; while it trains in this process always the same object."""
        return _training.get(path.resolve()) or cls(path)

    @classmethod
    def open(cls, id_or_path: str | Path, *, runs_dir: str | Path | None = None) -> Run:
        """A run by its folder, its id, its label, or an unambiguous end of its id ("amber-heron")."""
        path = Path(id_or_path)
        if _is_run(path):
            return cls.at(path)
        folder = Path(runs_dir) if runs_dir is not None else default_runs_dir()
        known = runs(folder)
        name = str(id_or_path)
        matches = [run for run in known if name in (run.id, run.about.label)]
        matches = matches or [run for run in known if run.id.endswith(name)]
        if len(matches) == 1:
            return matches[0]
        raise RunError(
            f"There is {'no' if not matches else 'more than one'} run {str(id_or_path)!r} in {folder}",
            "Known runs: " + (", ".join(run.id for run in matches or known[:5]) or "none"),
            "`nbtune runs` lists them; --runs-dir or NBTUNE_RUNS names another folder.",
        )

    def __repr__(self) -> str:
        return f"Run({self.id!r}, {self.status}, {self.progress().message})"

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def about(self) -> About:
        """The label and the note that a person gave it; see `rename` and `annotate`."""
        return shelf.read_about(self.path)

    @property
    def name(self) -> str:
        """Its label, else the part of its id that a person remembers: amber-heron of 20261122-071349-amber-heron."""
        return self.about.label or re.sub(r"^\d{8}-\d{6}-", "", self.id)

    @property
    def status(self) -> Status:
        events = self.events()
        if self._thread is not None and self._thread.is_alive():
            return living(events)
        if events and events[-1]["type"] == "end":
            return events[-1]["status"]
        if self._exception is not None:
            return "failed"
        if self._is_locked():  # by another process
            return living(events)
        return "interrupted" if events else "created"

    @property
    def error(self) -> str | None:
        """Why the run failed, in words for a person; None where it did not."""
        if self._exception is not None:
            return told(self._exception)
        return self._end().get("error")

    @property
    def traceback(self) -> str | None:
        """Where in the code it failed, for a report; None where it did not."""
        return self._end().get("traceback")

    @property
    def kept_step(self) -> int | None:
        """The step of the newest checkpoint, from which `resume` goes on; None where there is none yet."""
        return max((event["step"] for event in self.events() if event["type"] == "checkpoint"), default=None)

    def _end(self) -> Event:
        return next((event for event in reversed(self.events()) if event["type"] == "end"), {})

    def events(self) -> list[Event]:
        """What happened so far; see docs/architecture.md for the fields."""
        return self._events.read()

    def progress(self) -> Progress:
        """Step, total, time left and what is being done now."""
        return progress(self.events(), self.status)

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of `log.txt`."""
        path = self.path / "log.txt"
        return "\n".join(path.read_text(encoding="utf-8").splitlines()[-lines:]) if path.exists() else ""

    def summary(self) -> dict[str, Any]:
        """What the run came to, as in `summary.json`; made from the events so far while it is not there yet."""
        path = self.path / "summary.json"
        if path.exists() and self.status != "running":
            return json.loads(path.read_text(encoding="utf-8"))
        return summarise(self.id, self.spec, self.events(), self.status)

    @property
    def adapter_path(self) -> Path:
        """The folder of the trained adapter. Raises RunError where there is none (yet)."""
        path = self.path / "adapter"
        if path.exists():
            return path
        if self.spec.method == "full":
            raise RunError(f"{self.id} has no adapter", "It trained every weight (method='full').", "Use `model_path`.")
        raise RunError(f"{self.id} has no adapter yet", f"It is {self.status}.", "Wait for it, or resume it.")

    def stop(self) -> None:
        """Ask the run to end after the step in progress. Its checkpoint and adapter are kept; `resume` goes on."""
        self._tell("stop")

    def pause(self) -> None:
        """Ask the run to wait after the step in progress, with a checkpoint; its memory stays. `resume` goes on."""
        self._tell("pause")

    def _tell(self, wish: Wish) -> None:
        if self._thread is not None and self._thread.is_alive():
            self._control.wish = wish
        elif self._is_locked():
            leave_wish(self.path, wish)

    def wait(self, timeout: float | None = None) -> Run:
        """Block until the run ends; re-raise what its thread raised.

        Raises TimeoutError after `timeout` seconds; the run goes on.
        """
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise TimeoutError(f"{self.id} is still running after {timeout} s")
        if self._exception is not None:
            raise self._exception
        if self.status == "failed":
            raise RunError(f"{self.id} failed", self.error or "", f"The log is {self.path / 'log.txt'}.")
        return self

    def resume(self, *, num_processes: int | None = None, ray: str | None = None) -> Run:
        """Go on: at once where the run is paused, else from its last checkpoint in a daemon thread of this process.

        A finished run stays as it is. A run that has ended may go on with another number of processes; it does the
        same steps. `ray` is where those are, as for `train`.

        Raises RunError for another number while it is alive, NbtuneError for one that cannot be.
        """
        status = self.status
        if num_processes is not None and num_processes != self.spec.training.num_processes:
            self._share_out(num_processes, ray)
        if status == "paused":
            self._tell("go on")
            return self
        if status == "running":
            if self._thread is None:
                raise RunError(f"{self.id} is running in another process", "", "Stop it there, or wait for it.")
            if not self._control.should_stop():
                self._control.wish = "go on"  # it may have been asked to pause
                return self
            self._thread.join()  # it is on its way out
        if self.status != "finished":
            self._exception = None
            self._start(ray=ray)
        return self

    def _share_out(self, num_processes: int, ray: str | None) -> None:
        """Change the number of processes of a run that is not alive."""
        if self.status in ("running", "paused"):
            raise RunError(f"{self.id} is {self.status}", "", "Stop it before you change its number of processes.")
        spec = self.spec.updated(num_processes=num_processes)
        require(spec if ray is None else spec.updated(num_processes=1), runs_dir=self.path.parent)
        _files.write_text(self.path / "spec.yaml", spec.to_yaml())
        self.spec = spec

    def rename(self, label: str) -> None:
        """Give the run a label, in MLflow too; "" takes it away. The folder keeps its name."""
        self._describe(About(label, self.about.note))

    def annotate(self, note: str) -> None:
        """Write down what there is to say of the run, in MLflow too."""
        self._describe(About(self.about.label, note))

    def _describe(self, about: About) -> None:
        shelf.write_about(self.path, about)
        if (self.path / "mlflow.json").exists():
            from nbtune.train.tracking import send_about

            send_about(self.path)

    def delete(self) -> Path:
        """Throw the run away: its folder is moved to `.trash` beside it, from where `shelf.restore` brings it back.

        Returns where it lies. Raises RunError where the run is not at its end.
        """
        lock = self._lock()
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RunError(f"{self.id} is {self.status}", "", "Stop it before you delete it.") from error
        try:
            return shelf.discard(self.path)
        finally:
            lock.release()

    def watch(self) -> Run:
        """Show live charts (a progress line in a terminal) and block until the run ends; re-raise its failure.

        An interrupt (the square button, Ctrl-C) stops the run after its step.
        """
        from nbtune_widgets import watch

        watch(self)
        return self.wait()

    async def watch_async(self) -> Run:
        """As `watch`, but awaited: the notebook's buttons work while the cell runs."""
        from nbtune_widgets import watch_async

        await watch_async(self)
        return self.wait()

    def show(self) -> None:
        """Show live charts that follow the run from a thread, and return at once."""
        from nbtune_widgets import show

        show(self)

    @classmethod
    def create(cls, spec: RunSpec, *, runs_dir: str | Path | None = None, run_id: str | None = None) -> Run:
        """Make the folder of a run, and start nothing. Raises RunError where `run_id` cannot be its name."""
        folder = _folder(runs_dir, run_id)
        return cls._create(spec, folder, run_id or new_id(folder))

    @classmethod
    def _create(cls, spec: RunSpec, runs_dir: Path, run_id: str) -> Run:
        path = runs_dir / run_id
        with _files.atomic_folder(path) as folder:
            values = spec.to_dict()
            if spec.data.rows is not None:
                rows = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in spec.data.rows)
                (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
                values["data"]["source"] = str(path / "rows.jsonl")
            data = values["data"]
            sources = [data, *data["mix"], *(step for step in data["recipe"] if step.get("source"))]
            for part, key in ((values["model"], "name"), *((part, "source") for part in sources)):
                if Path(part[key]).exists():  # so that a resume from another folder finds it
                    part[key] = str(Path(part[key]).resolve())
            (folder / "spec.yaml").write_text(
                yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8"
            )
        return cls(path)

    def train_here(self, world: World) -> Run:
        """Train in this thread, as the first process of `world`, from the last checkpoint if there is one.

        Raises what goes wrong.
        """
        lock = self._lock_it()
        self._control = Control(self.path)
        _training[self.path] = self
        self._live(lock, world=world)
        return self.wait()

    def _start(self, train_in_folder: Callable[..., None] | None = None, *, ray: str | None = None) -> None:
        """Begin a life in a thread: of a run alone, or by what trains it together with others."""
        lock = self._lock_it()
        self._control = Control(self.path, passes_on=ray is not None or self.spec.training.num_processes > 1)
        self._control.wish = "go on"
        _training[self.path] = self
        place = {} if ray is None else {"ray": ray}
        self._thread = threading.Thread(
            target=self._live, args=(lock, train_in_folder), kwargs=place, name=f"nbtune-{self.id}", daemon=True
        )
        self._thread.start()

    def _lock_it(self) -> FileLock:
        lock = self._lock()
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RunError(f"{self.id} is running in another process", "", "Stop it there, or wait for it.") from error
        return lock

    def _lock(self) -> FileLock:
        return FileLock(self.path / ".lock", thread_local=False)

    def _is_locked(self) -> bool:
        try:
            with self._lock().acquire(timeout=0):
                return False
        except Timeout:
            return True

    def _live(self, lock: FileLock, train_in_folder: Callable[..., None] | None = None, **place: Any) -> None:
        """The body of the run's thread; the `place` where it is trained is what only a run alone is told."""
        journal = Journal(self.path)
        try:
            if train_in_folder is None:
                from nbtune.train.session import train_in_folder

            control = self._control
            train_in_folder(
                self.path,
                self.spec,
                on_event=journal,
                should_stop=control.should_stop,
                should_pause=control.should_pause,
                **place,
            )
        except BaseException as error:  # noqa: BLE001 - kept, shown, and raised again by wait()
            where = "".join(traceback.format_exception(error))
            journal.note(where)
            journal(
                {
                    "type": "end",
                    "step": last_step(self.events()),
                    "status": "failed",
                    "error": told(error),
                    "traceback": where,
                }
            )
            # A live traceback would keep the model's tensors in memory; its text is in the log.
            self._exception = _without_frames(error)
        finally:
            journal.close()
            self._finish(lock)

    def _finish(self, lock: FileLock) -> None:
        from nbtune.train.session import release_memory

        release_memory()
        status = self.events()[-1].get("status", "failed")
        summary = summarise(self.id, self.spec, self.events(), status)
        _files.write_text(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
        _training.pop(self.path, None)
        lock.release()


def _without_frames(error: BaseException) -> BaseException:
    """The error and its causes without the frames that hold tensors."""
    for part in (error, error.__cause__, error.__context__):
        if part is not None:
            part.__traceback__ = None
    return error
