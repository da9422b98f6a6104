"""What a sweep varies: settings by name, each with its values or a range, and the points that are tried.

space = {"learning_rate": Range(1e-5, 1e-3, log=True), "r": [4, 8, 16]}
grid({"r": [4, 8], "learning_rate": Range(1e-4, 4e-4, n=2)})     # 4 points
draw(space, 12, seed=0)                                           # 12 points, none twice

A point is plain values by name, which papermill can pass and JSON can keep.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from nbtune.errors import SweepError

Point = dict[str, Any]  # a value for each name of the space


@dataclasses.dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, both included; whole ones where both are whole.

    `n` of them make a grid. `log` spaces and draws them evenly in their logarithm, as suits a learning rate.
    """

    low: float
    high: float
    n: int | None = None
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise SweepError(f"{self} is empty", "", "Give the lower bound first.")
        if self.log and self.low <= 0:
            raise SweepError(f"{self} has no logarithm", "", "Begin above 0, or leave out log.")
        if self.n is not None and self.n < 2:
            raise SweepError(f"{self} has no two points", "", "Give n of 2 or more.")

    def __str__(self) -> str:
        return f"{self.low}..{self.high}" + (":log" if self.log else "") + (f":{self.n}" if self.n else "")

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def values(self) -> list[float]:
        """`n` numbers, evenly spaced; fewer where whole ones would coincide. Raises SweepError without `n`."""
        if self.n is None:
            raise SweepError(f"A grid cannot try every number of {self}", "", "Give the range an n, or draw at random.")
        return list(dict.fromkeys(self._at(index / (self.n - 1)) for index in range(self.n)))

    def draw(self, generator: random.Random) -> float:
        return self._at(generator.random())

    def _at(self, share: float) -> float:
        """The number at a share of the way from `low` to `high`."""
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        if self.whole:
            return round(value)
        return min(max(float(f"{value:.6g}"), self.low), self.high)  # six figures: what a person reads is what is tried


Space = Mapping[str, Sequence[Any] | Range]


def check_space(space: Space) -> None:
    """Raise SweepError where there is nothing to try, or where it is not said plainly."""
    if not space:
        raise SweepError("The space is empty", "No setting was given values.", 'Give some: {"r": [4, 8]}.')
    for name, values in space.items():
        if isinstance(values, Range):
            continue
        if isinstance(values, str | bytes) or not isinstance(values, list):
            raise SweepError(f"{name} is {values!r}", "", "Give a list of values, or nt.Range(low, high).")
        if not values:
            raise SweepError(f"{name} has no values", "", "Give it some, or take it out of the space.")
        if len(_distinct(values)) < len(values):
            raise SweepError(f"{name} has a value twice", str(values), "Use `repeats` to run the same again.")


def contains(space: Space, point: Point) -> bool:
    """Whether a point, which may have been added by hand, has a value of the space for each of its names."""
    return all(
        name in point
        and (values.low <= point[name] <= values.high if isinstance(values, Range) else point[name] in values)
        for name, values in space.items()
    )


def grid(space: Space) -> list[Point]:
    """Every combination; the last name varies fastest. Raises SweepError for a range without `n`."""
    axes = [values.values() if isinstance(values, Range) else values for values in space.values()]
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*axes)]


def draw(space: Space, count: int, *, seed: int) -> list[Point]:
    """`count` points at random, none twice; fewer where the space has no more. The first ones stay if `count` grows."""
    generator, points, seen = random.Random(seed), [], set()  # noqa: S311 - a sample, no secret
    for _ in range(100 * count):  # a space of few points is exhausted long before
        point = {
            name: values.draw(generator) if isinstance(values, Range) else generator.choice(values)
            for name, values in space.items()
        }
        if (key := repr(point)) not in seen:
            seen.add(key)
            points.append(point)
        if len(points) == count:
            break
    return points


def read_values(text: str) -> tuple[str, list[Any] | Range]:
    """A setting and its values as a command line has them: `r=4,8`, `learning_rate=1e-5..1e-3:log`, `r=2..64:log:6`."""
    name, equals, values = text.partition("=")
    if not equals or not values:
        raise SweepError(f"{text!r} has no values", "", "Write name=4,8 or name=1e-5..1e-3:log.")
    if found := re.fullmatch(r"([^.,:\s]\S*?)\.\.([^:,\s]+?)(:log)?(?::(\d+))?", values):
        low, high = read_value(found[1]), read_value(found[2])
        if not all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in (low, high)):
            raise SweepError(f"{text!r} is no range of numbers", "", "Write name=low..high.")
        return name, Range(low, high, int(found[4]) if found[4] else None, bool(found[3]))
    return name, [_number(value) for value in _yaml(f"[{values}]", text)]


def read_value(text: str) -> Any:
    """One value in YAML; `1e-4` is a number, which YAML alone takes for a text."""
    return _number(_yaml(text, text))


def _yaml(text: str, shown: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SweepError(f"{shown!r} cannot be read", str(error), "Put a text in quotes.") from error


def _number(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", value):
        return float(value)
    return value


def _distinct(values: Sequence[Any]) -> set[str]:
    return {repr(value) for value in values}
