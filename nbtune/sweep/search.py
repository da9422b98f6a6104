"""Optuna's samplers: the next point follows from how the earlier ones did.

    search = OptunaSearch(space, "tpe", seed=0)
    point = search.next([(earlier_point, 2.31), (running_point, None)])

The ledger is the truth about what was tried, so there is no database of Optuna's: a study is made anew for each
question from the points and their values, and a sweep that was killed goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nbtune.errors import SweepError
from nbtune.sweep.space import Point, Range, Space

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

SAMPLERS = ("tpe", "gp")
ATTEMPTS = 20  # questions until a sampler that gives known points only has nothing new


class OptunaSearch:
    """Points of a space by one of Optuna's samplers: `tpe` (Parzen estimators) or `gp` (a Gaussian process)."""

    def __init__(self, space: Space, sampler: str, *, seed: int, maximise: bool = False) -> None:
        if sampler not in SAMPLERS:
            raise SweepError(f"There is no sampler {sampler!r}", "", f"There are grid, random, {', '.join(SAMPLERS)}.")
        self._space, self._sampler, self._seed, self._maximise = space, sampler, seed, maximise
        self._axes = {name: _Axis(values) for name, values in space.items()}

    def next(self, tried: Sequence[tuple[Point, float | None]]) -> Point | None:
        """A point that was not tried; None where the sampler has no new one.

        `tried` holds every point so far and what it came to: None where it runs or came to nothing.
        """
        import optuna
        from optuna.trial import TrialState, create_trial

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        distributions = {name: axis.distribution for name, axis in self._axes.items()}
        study = optuna.create_study(
            sampler=self._sampler_of(len(tried)), direction="maximize" if self._maximise else "minimize"
        )
        for point, value in tried:
            study.add_trial(
                create_trial(
                    state=TrialState.RUNNING if value is None else TrialState.COMPLETE,
                    value=value,
                    params={name: axis.to_optuna(point[name]) for name, axis in self._axes.items()},
                    distributions=distributions,
                )
            )
        known = [point for point, _ in tried]
        for _ in range(ATTEMPTS):
            suggested = study.ask(distributions).params
            point = {name: axis.from_optuna(suggested[name]) for name, axis in self._axes.items()}
            if point not in known:
                return point
        return None

    def _sampler_of(self, tried: int) -> BaseSampler:
        from optuna import samplers

        seed = self._seed + tried  # a new study would draw the same first numbers again
        return samplers.TPESampler(seed=seed) if self._sampler == "tpe" else samplers.GPSampler(seed=seed)


class _Axis:
    """One name of the space, as Optuna has it: a choice is the index of its value, for values may be lists."""

    def __init__(self, values: Sequence[Any] | Range) -> None:
        self._values = values

    @property
    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        values = self._values
        if not isinstance(values, Range):
            return CategoricalDistribution(list(range(len(values))))
        if values.whole:
            return IntDistribution(int(values.low), int(values.high), log=values.log)
        return FloatDistribution(values.low, values.high, log=values.log)

    def to_optuna(self, value: Any) -> Any:
        return value if isinstance(self._values, Range) else self._values.index(value)

    def from_optuna(self, value: Any) -> Any:
        return value if isinstance(self._values, Range) else self._values[value]
