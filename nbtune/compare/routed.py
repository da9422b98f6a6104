"""The column of the router: each question is answered by the column that the router chooses, and it says why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from nbtune.compare.extra import Choice
from nbtune.infer.router import Router


class Routed:
    """The `Extra` of a router. Made when the first question comes: an index of the training data takes seconds."""

    name = "router "

    def __init__(self, make: Callable[[], Router]) -> None:
        self._make = make
        self._router: Router | None = None
        with gr.Accordion("Let a router choose", open=False, elem_id="nb-router"), gr.Row():
            self.shown = gr.Checkbox(
                False,
                label="Show the router's choice",
                info="As a column of its own, which says who answers, with what score, and why.",
                elem_id="router",
            )
        self.inputs: list[Any] = []

    def wire(self, model: dict[str, Any]) -> None:
        """It has no handlers of its own."""

    def preparing(self, values: Sequence[Any]) -> str | None:  # noqa: ARG002 - it has no inputs
        return "The router is made, which may read the adapters' training data first." if self._router is None else None

    def choose(self, values: Sequence[Any], question: str) -> Choice:  # noqa: ARG002 - it has no inputs
        if self._router is None:
            self._router = self._make()
        decision = self._router.route(question)
        return Choice(
            decision.column, f"{decision.column} {decision.score:.2f}: {decision.reason}", counted_as="router"
        )
