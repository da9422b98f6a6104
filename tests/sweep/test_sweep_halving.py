"""Early stopping: which trial falls behind, and what that saves."""

import math
import random

import pytest

from nbtune.errors import SweepError
from nbtune.sweep.halving import Halving, among_best, loss_at


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
