"""A sweep whose trials are trained together, as many as share a base model and fit: the scheduler of such a sweep.

A group is one job, a notebook of its own (`group.py`), in which each trial is a run as ever: it is watched, stopped
early or stopped by itself. When the group has ended, the notebook of each trial is executed over its finished run and
so becomes its report. Trials that nobody can be trained with are executed as in any sweep.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Literal

from nbtune.errors import NbtuneError
from nbtune.plan.together import plan_together
from nbtune.run import Run
from nbtune.spec import RunSpec
from nbtune.sweep.group import Wanted, write_group
from nbtune.sweep.job import Ended, Job
from nbtune.sweep.scheduler import GRACE, Running, Scheduler
from nbtune.sweep.trial import State, Trial
from nbtune.together import base_of, groups
from nbtune.train.handover import VARIABLE

Together = Literal["auto"] | bool
WORTH = 0.9  # of the time of one after the other, that "auto" asks for: each report is executed besides


class TogetherScheduler(Scheduler):
    """Starts waiting trials in groups."""

    def __init__(self, *args: Any, together: Together, memory_bytes: int | None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._only_if_worth, self._memory_bytes = together == "auto", memory_bytes
        self._groups: dict[str, list[int]] = {}  # the trials of each job that trains several
        self._alone: set[int] = set()  # those that could not be trained in a group
        self._reports: list[int] = []  # whose run has ended, and whose notebook is to be executed

    def _step(self, *, out_of_time: bool) -> bool:
        going_on = super()._step(out_of_time=out_of_time)
        if self._wishes.interrupted:
            return False
        while self._reports and self._executor.free:  # also of trials that were told to stop
            trial = self._trials()[self._reports.pop(0)]
            self._running[trial.number].deadline = None  # of the run's end
            self._executor.start(self._job(trial))
        return going_on or bool(self._running)

    def _next(self) -> Trial | None:
        return None if self._reports else super()._next()  # those first

    def _start(self, trial: Trial) -> None:
        if len(companions := self._companions(trial)) > 1:
            self._start_group(companions)
        else:
            super()._start(trial)

    def _companions(self, trial: Trial) -> list[Trial]:
        """The waiting trials that this one is trained with, itself among them."""
        waiting = [t for t in self._trials().values() if t.state == "waiting" and t.number not in self._alone]
        spec = self._specs.get(trial.number)
        if spec is None or trial.number in self._alone:
            return [trial]
        specs_of = [(other, self._specs.get(other.number)) for other in waiting]
        known = [(other, its) for other, its in specs_of if its is not None and base_of(its) == base_of(spec)]
        if len(known) == 1:
            return [trial]
        try:
            specs = [spec for _, spec in known]
            found = groups(specs, available_bytes=self._memory_bytes)
            mine = next(group for group in found if any(known[number][0] == trial for number in group))
            planned = plan_together([specs[number] for number in mine], in_new_process=True)
        except NbtuneError as error:  # its own notebook will say so
            self._wishes.warn(f"Trial {trial.number} is not trained with others: {error.title}")
            return [trial]
        if self._only_if_worth and (planned.ratio is None or planned.ratio > WORTH):
            return [trial]
        return [known[number][0] for number in mine]

    def _start_group(self, trials: list[Trial]) -> None:
        trials = [dataclasses.replace(trial, attempt=trial.attempt + 1) for trial in trials]
        name = f"group-{trials[0].run_prefix}"
        for trial in trials:
            self._put_aside(trial)
        folder = self.path / ".jobs"
        folder.mkdir(exist_ok=True)
        output = self.path / f"{name}.ipynb"
        output.unlink(missing_ok=True)  # of an attempt that was killed
        wanted = [Wanted(t.number, self._design.parameters(t.params), f"{t.run_prefix}-run") for t in trials]
        first = self._job(trials[0])
        notebook = write_group(folder, name, self._design.notebook.path, self.path / "runs", wanted)
        environment = {name: value for name, value in first.environment.items() if name != "NBTUNE_TRIAL"}
        facts = self._executor.start(Job(name, notebook, output, {}, self._cwd, environment, self.path / f"{name}.log"))
        self._groups[name] = [trial.number for trial in trials]
        for trial in trials:
            self._ledger.append("start", trial=trial.number, attempt=trial.attempt, **facts)
            self._running[trial.number] = Running(time.monotonic())

    def _job(self, trial: Trial) -> Job:
        job = super()._job(trial)
        run = trial.run if trial.state == "running" else None
        if run is None or _is_going_on(run):
            return job
        return dataclasses.replace(job, environment={**job.environment, VARIABLE: str(run.path)})

    def _group_of(self, trial: Trial) -> str | None:
        return next((name for name, numbers in self._groups.items() if trial.number in numbers), None)

    def _look(self, trial: Trial) -> None:
        if trial.number in self._reports:
            return  # its run has ended
        if self._group_of(trial) is None or self._running[trial.number].killed is None:
            super()._look(trial)
        elif time.monotonic() > (self._running[trial.number].deadline or 0):
            super()._kill(trial, self._running[trial.number].killed or "stopped")

    def _kill(self, trial: Trial, state: State) -> None:
        """End a trial; one of a group ends after its step, for the others go on."""
        running, name = self._running[trial.number], self._group_of(trial)
        if name is None:
            super()._kill(trial, state)
        elif running.killed is not None:  # it did not end in time: the others are done again
            self._executor.kill(name)
        elif running.run is not None:
            running.killed, running.deadline = state, time.monotonic() + GRACE
            running.run.stop()

    def _record(self, ended: Ended) -> None:
        if ended.name not in self._groups:
            super()._record(ended)
            return
        numbers = self._groups.pop(ended.name)
        was_killed = any(self._running[number].killed is not None for number in numbers)
        # Whose fault it was that a whole group died is seen when each is done alone.
        one_by_one = ended.outcome == "died" and not was_killed
        if ended.outcome == "failed":
            self._wishes.warn(f"{ended.name} was not trained together: {ended.error}")
        elif one_by_one:
            self._wishes.warn(f"{ended.name} died, its trials are executed one by one: {ended.error}")
        for trial in (self._trials()[number] for number in numbers):
            run, killed = trial.run, self._running[trial.number].killed
            if killed is not None:
                super()._record(Ended(trial.name, "finished"))
            elif run is not None and not _is_going_on(run):
                self._reports.append(trial.number)
            else:  # it was left out, or another's end was the group's
                self._alone.update([trial.number] if run is None or one_by_one else [])
                del self._running[trial.number]
                self._ledger.append("retry", trial=trial.number)


def foretell(specs: Sequence[RunSpec], available_bytes: int | None) -> str:
    """How trials with these specs are grouped, and what that saves, in words."""
    found = [[specs[number] for number in group] for group in groups(specs, available_bytes=available_bytes)]
    shared = [plan_together(group, in_new_process=True) for group in found if len(group) > 1]
    if not shared:
        return "No two of the trials can share a base model."
    sizes = ", ".join(str(len(planned.specs)) for planned in shared)
    text = f"Trained together, on one base each: {sizes} trials"
    times = [(planned.seconds, planned.alone_seconds) for planned in shared]
    seconds, alone = sum(one or 0 for one, _ in times), sum(other or 0 for _, other in times)
    if not alone or None in (one for one, _ in times):
        return f"{text}."
    return f"{text}; about {seconds / alone:.2f} of the time of one after the other."


def _is_going_on(run: Run) -> bool:
    return run.status not in ("finished", "stopped", "failed")
