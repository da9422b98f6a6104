"""Early stopping: which trial falls behind, and what that saves."""

import math
import random
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock
from toy import write_toy

from nbtune.errors import SweepError
from nbtune.spec import TrackingSpec
from nbtune.sweep.design import Design
from nbtune.sweep.halving import Halving, among_best, loss_at
from nbtune.sweep.job import Ended
from nbtune.sweep.ledger import Ledger
from nbtune.sweep.notebook import SweepNotebook
from nbtune.sweep.preview import Forecaster
from nbtune.sweep.scheduler import Budget, Scheduler
from nbtune.sweep.trial import best
from nbtune.sweep.wishes import Wishes
from nbtune.train.control import Control
from nbtune.train.events import EventLog


def events(losses, total=100, eval_every=1, held_out=True):
    """Those of a run that has done `len(losses)` steps."""
    found = [{"type": "start", "step": 0, "total_steps": total, "eval_examples": 4 if held_out else 0}]
    for step, loss in enumerate(losses, 1):
        found.append({"type": "train", "step": step, "loss": loss})
        if held_out and step % eval_every == 0:
            found.append({"type": "eval", "step": step, "eval_loss": loss})
    return found


@pytest.mark.parametrize(
    ("loss", "losses", "factor", "goes_on"),
    [
        (2.0, [2.0], 3, True),  # the first one has nobody to be compared with
        (2.0, [2.0, 1.0], 3, False),
        (1.0, [2.0, 1.0], 3, True),
        (2.0, [1.0, 2.0, 3.0, 4.0], 3, True),  # two of four go on
        (3.0, [1.0, 2.0, 3.0, 4.0], 3, False),
        (1.0, [1.0, 1.0, 1.0], 3, True),  # nobody is worse
        (math.inf, [math.inf], 3, False),
    ],
)
def test_the_best_part_goes_on(loss, losses, factor, goes_on):
    assert among_best(loss, losses, factor) == goes_on


def test_a_rung_is_judged_at_the_first_evaluation_after_it():
    run = events([5.0, 4.0, 3.0, 2.0, 1.0], eval_every=2)
    assert [loss_at(run, step) for step in (1, 2, 3, 4, 5)] == [4.0, 4.0, 2.0, 2.0, None]
    assert loss_at([], 1) is None


def test_without_held_out_rows_it_is_the_mean_training_loss():
    run = events([9.0] * 6 + [3.0, 1.0], held_out=False)
    assert loss_at(run, 8) == 2.0  # of the last quarter
    assert loss_at(run, 9) is None
    assert loss_at(events([None], held_out=False), 1) == math.inf


def test_the_first_at_a_rung_is_judged_anew_when_a_better_one_comes():
    halving = Halving(first=2, factor=2)
    bad, good = events([2.0] * 3), events([1.0] * 2)
    assert not halving.falls_behind(1, events([2.0]))  # no rung yet
    assert not halving.falls_behind(1, bad)
    assert not halving.falls_behind(2, good)
    assert halving.falls_behind(1, bad)


def test_a_run_that_is_done_is_not_stopped():
    halving = Halving(first=2, factor=2)
    halving.falls_behind(1, events([1.0] * 4, total=4))
    assert halving.falls_behind(2, events([2.0] * 3, total=4))
    assert not halving.falls_behind(3, events([2.0], total=1))


@pytest.mark.parametrize("numbers", [(0, 3), (5, 1)])
def test_rungs_that_stop_nothing_are_refused(numbers):
    with pytest.raises(SweepError):
        Halving(*numbers)


@pytest.mark.parametrize("jobs", [1, 2, 4])
def test_the_best_of_sixteen_is_found_in_half_the_steps(jobs):
    """Curves that fall to different floors at different speeds; trials step by turns, some at a time."""
    generator = random.Random(1)
    curves = [(generator.uniform(1.0, 3.0), generator.uniform(5, 15)) for _ in range(16)]
    total, halving = 90, Halving(first=10, factor=3)

    def losses(trial, steps):
        floor, pace = curves[trial]
        return [floor + 2 * math.exp(-step / pace) for step in range(1, steps + 1)]

    waiting, done, running, spent = list(range(16)), {}, {}, 0
    while waiting or running:
        while waiting and len(running) < jobs:
            running[waiting.pop(0)] = 0
        for trial in list(running):
            running[trial] += 1
            spent += 1
            if running[trial] == total:
                done[trial] = losses(trial, total)[-1]
                del running[trial]
            elif halving.falls_behind(trial, events(losses(trial, running[trial]), total)):
                del running[trial]
    assert min(done, key=done.get) == min(range(16), key=lambda trial: losses(trial, total)[-1])
    assert spent <= 16 * total / 2


class Threads:
    """An executor whose jobs write a run's events and take no process: a step is a millisecond."""

    def __init__(self, jobs, losses):
        self._jobs, self._losses = jobs, losses
        self._running = {}

    @property
    def free(self):
        return self._jobs - len(self._running)

    def start(self, job):
        self._running[job.name] = threading.Thread(target=self._train, args=(job,))
        self._running[job.name].start()
        return {}

    def waits(self, name):
        return False

    def ended(self):
        done = [name for name, thread in self._running.items() if not thread.is_alive()]
        for name in done:
            del self._running[name]
        return [Ended(name, "finished") for name in done]

    def close(self):
        for thread in self._running.values():
            thread.join()

    def _train(self, job):
        path = Path(job.environment["NBTUNE_RUNS"]) / f"{job.environment['NBTUNE_TRIAL']}-run"
        path.mkdir(parents=True)
        log, control, status = EventLog(path), Control(path), "finished"
        with FileLock(path / ".lock"):
            log.append({"type": "start", "step": 0, "total_steps": TOTAL, "eval_examples": 1})
            (path / "spec.yaml").write_text("model: {name: toy}")
            for step, loss in enumerate(self._losses(job.parameters["seed"]), 1):
                log.append({"type": "train", "step": step, "loss": loss, "tokens": 8, "tokens_per_second": 400.0,
                            "peak_memory_bytes": 1})  # fmt: skip
                log.append({"type": "eval", "step": step, "eval_loss": loss})
                time.sleep(0.02)
                if control.should_stop():
                    status = "stopped"
                    break
            log.append({"type": "end", "step": step, "status": status})


TOTAL = 60


def test_a_sweep_of_sixteen_finds_the_best_in_half_the_steps(tmp_path):
    """The whole of it, on a notebook: what stops trials are the events that their runs wrote."""
    toy = write_toy(tmp_path / "toy.ipynb")
    floors = random.Random(3).sample(range(10, 42), 16)

    def losses(seed):
        return [floors[seed] / 10 + 2 * math.exp(-step / 8) for step in range(1, TOTAL + 1)]

    def swept(name, halving):
        design = Design(SweepNotebook(toy), {"seed": list(range(16))}, {})
        path = tmp_path / name
        path.mkdir()
        scheduler = Scheduler(path, design, Budget(), Threads(4, losses), Wishes(path), Forecaster(None),
                              halving=halving, tracking=TrackingSpec(mlflow=False))  # fmt: skip
        scheduler.live()
        return list(Ledger(path).trials().values())

    whole, halved = swept("whole", None), swept("halved", Halving(first=4, factor=3))
    assert {trial.state for trial in whole} == {"finished"}
    assert {trial.state for trial in halved} == {"finished", "stopped early"}
    best_of_all, found = (best(trials, "eval_loss_after", maximise=False) for trials in (whole, halved))
    assert found.params == best_of_all.params == {"seed": floors.index(min(floors))}
    assert found.state == "finished"
    steps = [sum(trial.metrics["steps"] for trial in trials) for trials in (whole, halved)]
    assert steps[0] == 16 * TOTAL
    assert steps[1] <= steps[0] / 2
