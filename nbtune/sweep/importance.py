"""How much each setting of a sweep matters: the share of the metric's variance that its values explain by themselves.

The trials are grouped by the value of a setting. What the groups' means differ by, beside what trials differ by anyway,
is epsilon squared (Kelley 1935), 1 - (within / (n - k)) / (total / (n - 1)) for n trials in k groups: the share of the
variance between the groups, less what k groups drawn by chance would show. 0 is no more than chance, 1 is everything.
Settings that matter only together with another are not seen. In a grid the shares of all settings add up to at most
one; at random, with few trials, they need not.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from nbtune.sweep.trial import Trial

GROUPS = 3  # of the numbers of a range: low, middle, high
FEWEST = 4  # trials of which anything can be said


@dataclasses.dataclass(frozen=True)
class Importance:
    """How much one setting matters."""

    name: str
    share: float  # of the variance, 0 to 1


def importance(trials: Iterable[Trial], metric: str) -> list[Importance]:
    """The settings by their importance, the greatest first; only those that enough trials tell of."""
    valued = [trial for trial in trials if math.isfinite(trial.metrics.get(metric, math.nan))]
    found = []
    for name in dict.fromkeys(name for trial in valued for name in trial.params):
        known = [(trial.params[name], trial.metrics[metric]) for trial in valued if name in trial.params]
        groups = _groups(known)
        if len(known) >= FEWEST and 1 < len(groups) < len(known):
            found.append(Importance(name, explained(groups)))
    return sorted(found, key=lambda one: one.share, reverse=True)


def explained(groups: Sequence[Sequence[float]]) -> float:
    """Epsilon squared of these groups of values, not below 0; 0 where all values are the same."""
    values = [value for group in groups for value in group]
    total = _squares(values)
    if total == 0 or len(values) <= len(groups):
        return 0.0
    within = sum(_squares(group) for group in groups)
    return max(0.0, 1 - (within / (len(values) - len(groups))) / (total / (len(values) - 1)))


def _groups(known: Sequence[tuple[Any, float]]) -> list[list[float]]:
    """The metric's values by the setting's; numbers that hardly occur twice are first sorted into GROUPS."""
    by_value: dict[str, list[float]] = {}
    for value, metric in known:
        by_value.setdefault(repr(value), []).append(metric)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value, _ in known)
    if not numbers or len(by_value) <= max(GROUPS, len(known) // 2):
        return list(by_value.values())
    ordered = [metric for _, metric in sorted(known)]
    ends = [round(len(ordered) * part / GROUPS) for part in range(GROUPS + 1)]
    return [ordered[start:end] for start, end in itertools.pairwise(ends) if end > start]


def _squares(values: Sequence[float]) -> float:
    """The sum of the squared distances from the mean."""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values)
