"""Fields of configs: a default with its help and limits, and those that many methods have, once."""

from __future__ import annotations

from typing import Any

from nbtune._settings import detail, setting


def rank(default: int = 8, help: str = "Rank of the update.", label: str = "Rank r") -> Any:
    """The field `r`."""
    return setting(default, help, label=label, ge=1, sweepable=True)


def strength(default: float, by: str) -> Any:
    """The field alpha; the update is scaled `by` it over something."""
    return setting(default, f"Strength of the update: it is scaled by {by}.", label="Alpha", gt=0, sweepable=True)


def share(help: str = "Share of the adapter's inputs dropped in training.") -> Any:
    """A dropout, 0 by default."""
    return setting(0.0, help, label="Dropout", ge=0, lt=1, sweepable=True)


def pattern(what: str) -> Any:
    """Another value of a setting for some modules."""
    return detail(help=f"Another {what} for some modules: a name or regular expression and its {what}.", factory=dict)


def unchanged(help: str = "Start without a change. False: start random, for tests.", **metadata: Any) -> Any:
    """The field `init_weights` of a method that can start without changing the model."""
    return detail(**{"default": True, "help": help, "label": "Initialisation", **metadata})
