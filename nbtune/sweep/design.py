"""The design of a sweep: everything that makes it this sweep and no other, and the points that follow from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nbtune.errors import NbtuneError, SweepError
from nbtune.spec import RunSpec
from nbtune.sweep.notebook import SweepNotebook
from nbtune.sweep.preview import Forecast, Forecaster, Preview
from nbtune.sweep.search import SAMPLERS, OptunaSearch
from nbtune.sweep.space import Point, Range, Space, check_space, contains, draw, grid
from nbtune.sweep.trial import METRICS


@dataclasses.dataclass(frozen=True)
class Design:
    """What is tried, on which notebook, and what is best.

    Raises NbtuneError where it cannot be carried out: an empty space, an unknown name, a value of the wrong type.
    """

    notebook: SweepNotebook
    space: Space
    params: Mapping[str, Any]  # the same in every trial
    sampler: str = "grid"  # or "random", or one of Optuna's
    repeats: int = 1  # of each point, each with a seed of its own
    seed: int = 0
    metric: str = "eval_loss_after"
    maximise: bool = False

    def __post_init__(self) -> None:
        check_space(self.space)
        if self.sampler not in ("grid", "random", *SAMPLERS):
            known = ", ".join(("grid", "random", *SAMPLERS))
            raise SweepError(f"There is no sampler {self.sampler!r}", "", f"There are {known}.")
        if self.metric not in METRICS:
            raise SweepError(f"A run has no {self.metric!r}", "", f"It has {', '.join(METRICS)}.")
        if twice := sorted(set(self.space) & set(self.params)):
            raise SweepError(f"{twice[0]} is varied and fixed at once", "", "Leave it out of one of the two.")
        if self.repeats < 1:
            raise SweepError(f"repeats is {self.repeats}", "", "Give 1 or more.")
        if self.repeats > 1 and "seed" in {*self.space, *self.params}:
            raise SweepError("seed is set, and repeats would set it too", "", "Use one of the two.")
        for point in self._corners():
            self.spec(point)

    @property
    def adaptive(self) -> bool:
        """Whether a point follows from the results of earlier ones."""
        return self.sampler in SAMPLERS

    def parameters(self, point: Point) -> dict[str, Any]:
        """What the notebook is given for a point."""
        return self.notebook.parameters({**self.params, **point})

    def spec(self, point: Point) -> RunSpec | None:
        """The run of a point, None where the notebook's parameters do not tell it."""
        try:
            return self.notebook.spec(self.parameters(point))
        except NbtuneError as error:
            shown = ", ".join(f"{name}={value}" for name, value in point.items())
            raise SweepError(f"A trial with {shown} cannot be run", str(error)) from error

    def points(self, trials: int | None) -> list[Point]:
        """The points that are known beforehand, all of them once before any is repeated; at most `trials`.

        Raises SweepError where a number of trials is needed and not given.
        """
        if self.adaptive:
            return []
        if self.sampler == "grid":
            once = grid(self.space)
        elif trials is None:
            raise SweepError("Random points have no end", "", "Say how many trials there are to be: trials=20.")
        else:
            once = draw(self.space, -(-trials // self.repeats), seed=self.seed)
        return [self.seeded(point, repeat) for repeat in range(self.repeats) for point in once][:trials]

    def seeded(self, point: Point, repeat: int) -> Point:
        return {**point, "seed": self.seed + repeat} if self.repeats > 1 else point

    def next_point(self, tried: list[tuple[Point, float | None]]) -> Point | None:
        """The next point of an adaptive sampler, or the same once more; None where there is none."""
        bare = [({n: point[n] for n in self.space}, value) for point, value in tried if contains(self.space, point)]
        if bare:
            last = bare[-1][0]
            done = sum(point == last for point, _ in bare)
            if done < self.repeats:
                return self.seeded(last, done)
        point = OptunaSearch(self.space, self.sampler, seed=self.seed, maximise=self.maximise).next(bare)
        return None if point is None else self.seeded(point, 0)

    def preview(self, forecaster: Forecaster, *, trials: int | None, jobs: int) -> Preview:
        """The trials to come. Raises SweepError where none of them fits into memory."""
        if self.adaptive:
            if trials is None:
                raise SweepError("A search has no end", "", "Say how many trials there are to be: trials=20.")
            return Preview([], jobs, to_come=trials)
        seen: dict[Any, int] = {}
        shown: list[tuple[Point, Forecast]] = []
        for number, point in enumerate(self.points(trials), 1):
            spec = self.spec(point)
            key = number if spec is None else spec.to_yaml()
            first = seen.setdefault(key, number)
            shown.append((point, forecaster(spec) if first == number else Forecast(refused=f"the same as {first}")))
        if all(forecast.refused for _, forecast in shown):
            raise SweepError("No trial can be run", f"The first one {shown[0][1].refused}.", "Make the runs smaller.")
        return Preview(shown, jobs)

    def require(self, trials: int | None, runs_dir: Path) -> None:
        """Raise NbtuneError where a trial would fail of what can be seen before. Once for each model and data."""
        from nbtune.check import require

        seen: set[str] = set()
        for point in self.points(trials) or self._corners():
            spec = self.spec(point)
            if spec is None:
                return
            key = json.dumps([spec.model.model_dump(), spec.data.model_dump(), spec.training.max_length], default=str)
            if key not in seen:
                seen.add(key)
                require(spec, runs_dir=runs_dir)

    @classmethod
    def of_identity(cls, identity: Mapping[str, Any], notebook: Path) -> Design:
        """The design that `identity` tells of, of a notebook that lies here."""
        space = {n: Range(**values) if isinstance(values, dict) else values for n, values in identity["space"].items()}
        others = {name: value for name, value in identity.items() if name not in ("notebook", "space", "cwd")}
        return cls(SweepNotebook(notebook), space, **others)

    def identity(self) -> dict[str, Any]:
        """Plain values, the same for the same sweep; budgets, which only say how much of it is done, are no part."""
        space = {
            name: dataclasses.asdict(values) if isinstance(values, Range) else list(values)
            for name, values in self.space.items()
        }
        return {
            "notebook": self.notebook.digest,
            "space": space,
            "params": dict(self.params),
            "sampler": self.sampler,
            "repeats": self.repeats,
            "seed": self.seed,
            "metric": self.metric,
            "maximise": self.maximise,
        }

    def default_folder(self) -> Path:
        """`sweeps/<notebook>-<digest>`: the same call finds its sweep again."""
        digest = hashlib.sha256(json.dumps(self.identity()).encode()).hexdigest()[:8]
        return Path("sweeps") / f"{self.notebook.path.stem}-{digest}"

    def _corners(self) -> Iterator[Point]:
        """Points in which each value of the space occurs, for a check of names and types; of a range its ends."""
        axes = {n: [v.low, v.high] if isinstance(v, Range) else v for n, v in self.space.items()}
        for index in range(max(map(len, axes.values()))):
            yield self.seeded({name: values[min(index, len(values) - 1)] for name, values in axes.items()}, 0)
