"""Asynchronous successive halving: stop early what others were better than at the same step.

    halving = Halving(first=20, factor=3)       # looks after 20, 60, 180, ... steps
    halving.falls_behind(trial, run.events())

At each rung a run goes on as long as it is among the best 1/factor of all that came to it so far. Nothing waits, so
slow trials and slow machines hold nobody up. After Li et al., A System for Massively Parallel Hyperparameter Tuning
(arXiv:1810.05934), who pause runs and promote the best; here they run, and those that fall behind are stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from nbtune.errors import SweepError
from nbtune.train.events import Event

SMOOTHED = 4  # without held-out rows: the mean training loss of the last quarter of the steps to a rung


class Halving:
    """What each trial's loss was at each rung: `first` steps, and `factor` times as many each time after."""

    def __init__(self, first: int, factor: int = 3) -> None:
        if first < 1 or factor < 2:
            raise SweepError(
                f"Halving with first={first} and factor={factor} stops nothing", "", "Give first >= 1 and factor >= 2."
            )
        self.first, self.factor = first, factor
        self._losses: dict[int, dict[int, float]] = {}  # by rung, in steps, and trial

    def falls_behind(self, trial: int, events: Sequence[Event]) -> bool:
        """Whether the run with these events should stop: at the last rung that it came to, others are better.

        It may be asked at any time: one that was the first at a rung is judged anew when others come to it.
        """
        reached = None
        for rung in self._rungs(events):
            loss = loss_at(events, rung)
            if loss is None:
                break
            self._losses.setdefault(rung, {})[trial] = loss
            reached = rung
        if reached is None:
            return False
        at_rung = self._losses[reached]
        return not among_best(at_rung[trial], list(at_rung.values()), self.factor)

    def _rungs(self, events: Sequence[Event]) -> Iterator[int]:
        """The rungs that the run has come to. Its last step is none: there it is done."""
        total = next((event["total_steps"] for event in reversed(events) if event["type"] == "start"), math.inf)
        last = max((event["step"] for event in events if event["type"] in ("train", "eval")), default=0)
        rung = self.first
        while rung <= last and rung < total:
            yield rung
            rung *= self.factor


def among_best(loss: float, losses: Sequence[float], factor: int) -> bool:
    """Whether a loss is among the best 1/factor (rounded up) of all these, of which it is one."""
    return math.isfinite(loss) and loss <= sorted(losses)[math.ceil(len(losses) / factor) - 1]


def loss_at(events: Sequence[Event], step: int) -> float | None:
    """The held-out loss at the first evaluation after `step` steps, None before it.

    Where nothing is held out, the mean training loss of the steps that lead to it. One that is no number is infinite.
    """
    start = next((event for event in reversed(events) if event["type"] == "start"), None)
    if start is None:
        return None
    if start["eval_examples"]:
        later = [event["eval_loss"] for event in events if event["type"] == "eval" and event["step"] >= step]
        return _finite(later[0]) if later else None
    losses = {event["step"]: event["loss"] for event in events if event["type"] == "train"}
    if step not in losses:
        return None
    recent = [_finite(losses[at]) for at in losses if step - max(1, step // SMOOTHED) < at <= step]
    return sum(recent) / len(recent)


def _finite(loss: float | None) -> float:
    return math.inf if loss is None else loss
