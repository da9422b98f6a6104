"""How good columns are by the votes on them: a Bradley-Terry model, with how sure that is.

A column has a strength, in log-odds: it beats another with probability sigmoid(difference). The best of k is chosen
with probability softmax(strengths), which for two columns is the same, and for k is the probability of the k-1 wins
that come with one vote (Luce, 1959). Taken as k-1 independent wins they would say as much as k-1 votes, and the
intervals would be too narrow: for the best of four, 83 % of them would be right instead of 95 %.

A tie is shared by the winners, half a vote each where there are two. "All bad" says nothing about the order.

Before the first vote each column has half a win and half a loss, spread evenly over the others. So a column that
always wins has a finite strength, and columns that were never compared are held together, loosely.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from nbtune.compare.votes import Vote
from nbtune.errors import NbtuneError

Floats = npt.NDArray[np.float64]
Choices = dict[tuple[tuple[int, ...], int], float]  # (columns to choose from, the one chosen) -> votes

PRIOR = 0.5  # wins and losses of a column before the first vote
Z = 1.959964  # of a normal distribution, 95 % lies within so many standard deviations


@dataclasses.dataclass(frozen=True)
class Standing:
    """What the votes say of one column. Wins, ties and losses are against each other column of a vote."""

    column: str
    votes: int  # that it took part in
    all_bad: int  # of these, votes that found every answer bad
    wins: int
    ties: int
    losses: int
    strength: float  # log-odds against an opponent of the average strength of the others
    error: float  # standard deviation of the strength

    @property
    def win_rate(self) -> float | None:
        """Share of its comparisons that it won, a tie being half a win; none before the first."""
        count = self.wins + self.ties + self.losses
        return (self.wins + self.ties / 2) / count if count else None

    @property
    def probability(self) -> float:
        """Of winning against that average opponent, 0 to 1."""
        return _sigmoid(self.strength)

    @property
    def lower(self) -> float:
        """Where the 95 % interval of the probability begins."""
        return _sigmoid(self.strength - Z * self.error)

    @property
    def upper(self) -> float:
        """Where the 95 % interval of the probability ends."""
        return _sigmoid(self.strength + Z * self.error)

    @property
    def text(self) -> str:
        """For people: `amber-heron 0.71 ± 0.09`, half the width of the interval."""
        return f"{self.column} {self.probability:.2f} ± {(self.upper - self.lower) / 2:.2f}"


def standings(votes: Iterable[Vote], columns: Sequence[str]) -> list[Standing]:
    """Where these columns stand, the strongest first. Of a vote on more columns, what it says of these is taken.

    Raises NbtuneError for fewer than two columns, one that is named twice, or votes on several base models.
    """
    if len(columns) < 2 or len(set(columns)) < len(columns):
        raise NbtuneError("There is nothing to rank", f"Columns: {', '.join(columns)}.", "Name two or more, each once.")
    asked = [asked for vote in _of_one_model(votes) if (asked := _among(vote, columns)) is not None]
    strengths, errors = _fit(_choices(asked), len(columns))
    found = [
        Standing(column, *_counts(asked, index), strength=float(strengths[index]), error=float(errors[index]))
        for index, column in enumerate(columns)
    ]
    return sorted(found, key=lambda standing: -standing.strength)


def groups(votes: Iterable[Vote], columns: Sequence[str]) -> list[tuple[str, ...]]:
    """The columns that were compared with each other, directly or by way of others.

    Between two groups the votes say nothing: their order is the prior's, and the intervals are wide.
    """
    found = [{column} for column in columns]
    for vote in votes:
        linked = [group for group in found if vote.best and group.intersection(vote.columns)]
        if len(linked) > 1:
            found = [group for group in found if group not in linked] + [set().union(*linked)]
    return sorted((tuple(c for c in columns if c in group) for group in found), key=lambda g: columns.index(g[0]))


Asked = tuple[tuple[int, ...], tuple[int, ...]]  # columns shown, and those among them that were best


def _of_one_model(votes: Iterable[Vote]) -> list[Vote]:
    votes = list(votes)
    if len(models := sorted({vote.model for vote in votes})) > 1:
        raise NbtuneError(
            "These votes are on several base models",
            f"{', '.join(models)}: the column base is another model in each.",
            "Rank one at a time: ballots.votes(model=...).",
        )
    return votes


def _among(vote: Vote, columns: Sequence[str]) -> Asked | None:
    """What a vote says of these columns; None where it says nothing: one of them at most, or another was best."""
    shown = tuple(index for index, column in enumerate(columns) if column in vote.columns)
    best = tuple(index for index in shown if columns[index] in vote.best)
    return None if len(shown) < 2 or (vote.best and not best) else (shown, best)


def _counts(asked: Sequence[Asked], index: int) -> tuple[int, int, int, int, int]:
    """votes, all_bad, wins, ties, losses of one column."""
    mine = [(shown, best) for shown, best in asked if index in shown]
    wins = sum(len(shown) - len(best) for shown, best in mine if index in best)
    ties = sum(len(best) - 1 for _, best in mine if index in best)
    losses = sum(len(best) for _, best in mine if index not in best)
    return len(mine), sum(not best for _, best in mine), wins, ties, losses


def _choices(asked: Sequence[Asked]) -> Choices:
    choices: Choices = collections.defaultdict(float)
    for shown, best in asked:
        for index in best:
            choices[shown, index] += 1 / len(best)
    return choices


def _fit(choices: Choices, count: int) -> tuple[Floats, Floats]:
    """Strengths [K] against the average of the others, where they are likeliest, and their standard deviations [K]."""
    choices = collections.defaultdict(float, choices)
    for one in range(count):
        for other in range(one + 1, count):
            choices[(one, other), one] += PRIOR / (count - 1)
            choices[(one, other), other] += PRIOR / (count - 1)
    strengths = np.zeros(count)
    value, gradient, information = _likelihood(choices, strengths)
    for _ in range(100):  # Newton's method on a concave function: under ten steps
        step = np.linalg.solve(information, gradient)
        if np.abs(step).max() < 1e-9:
            break
        scale, noise = 1.0, 1e-12 * abs(value)
        while (tried := _likelihood(choices, strengths + scale * step))[0] < value - noise and scale > 1e-3:
            scale /= 2
        strengths = strengths + scale * step
        value, gradient, information = tried
    contrasts = (count * np.eye(count) - 1) / (count - 1)  # from strengths to strengths against the average other
    covariance = contrasts @ np.linalg.inv(information) @ contrasts.T
    return contrasts @ strengths, np.sqrt(np.diag(covariance))


def _likelihood(choices: Choices, strengths: Floats) -> tuple[float, Floats, Floats]:
    """Log-likelihood, its gradient [K] and the information [K, K], with the sum of all strengths held at zero."""
    count = len(strengths)
    value, gradient, information = 0.0, np.zeros(count), np.full((count, count), 1 / count)
    for (shown, chosen), weight in choices.items():
        these = list(shown)
        above = strengths[these] - strengths[these].max()
        whole = np.exp(above).sum()
        probabilities = np.exp(above) / whole
        value += weight * float(above[these.index(chosen)] - np.log(whole))
        gradient[chosen] += weight
        gradient[these] -= weight * probabilities
        information[np.ix_(these, these)] += weight * (np.diag(probabilities) - np.outer(probabilities, probabilities))
    return value, gradient, information


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
