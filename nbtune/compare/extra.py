"""Columns that can be shown beside the base and the adapters, each with a panel of its own under the chat."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import gradio as gr


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which of the engine's columns answers in a shown column, and what is said of it above the answer."""

    column: str
    label: str | None = None  # none: what is always said of it
    counted_as: str | None = None  # in votes; none: the shown column's name


class Extra(Protocol):
    """Draws its panel inside the Blocks that are being built. `inputs` goes to handlers; `choose` reads it there."""

    @property
    def name(self) -> str:
        """What the column is called: with a blank at its end, which no run's and no folder's name has."""
        ...

    shown: gr.Checkbox
    inputs: list[Any]

    def preparing(self, values: Sequence[Any]) -> str | None:
        """What `choose` would need seconds for, for the person who waits; None where it needs none."""
        ...

    def choose(self, values: Sequence[Any], question: str) -> Choice:
        """Who answers this question. Raises NbtuneError where that cannot be said."""
        ...

    def wire(self, model: dict[str, Any]) -> None:
        """Connect the panel's own handlers. `model` holds what all that use the model have in common."""
        ...
