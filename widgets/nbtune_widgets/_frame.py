"""The wizard's frame: the steps above, the pages between, the plan and the buttons below. It knows of no spec."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from html import escape
from typing import Any

import ipywidgets as widgets

from nbtune_widgets._style import chip, gigabytes, notice, style

STEPS = ("Model", "Data", "Method", "Training", "Review", "Sweep")
_WRAP = {"flex_flow": "row wrap", "align_items": "center"}

Act = Callable[[], Any]


class Frame:
    """Widgets and what shows where. Buttons are given their meaning by `act`.

    Args:
        pages: One for each of STEPS.
        act: Makes a callback of a function, one that keeps and shows its error.
    """

    def __init__(self, pages: Sequence[widgets.DOMWidget], act: Callable[[Act], Callable[[Any], None]]) -> None:
        self.step = 0
        self._pages = pages
        self._act = act
        self.pills = [
            self.button(f"{n} {name}", lambda n=n: self.on_go(n - 1)) for n, name in enumerate(STEPS, start=1)
        ]
        for pill in self.pills:
            pill.add_class("nt-step")
        self.on_go: Callable[[int], None] = self.go
        self.machine = widgets.HTML(chip(f"{cores()} cores"), layout=widgets.Layout(margin="0 0 0 auto"))
        self.status, self.notice = widgets.HTML(), widgets.HTML()
        self.told = widgets.HTML(layout=widgets.Layout(flex="1 1 auto", min_width="0"))
        self.undo = self.button("Undo", self._undo, "Everything as it was before")
        self.on_undo: Act = lambda: None
        self._told = widgets.HBox([self.told, self.undo], layout=widgets.Layout(display="none", align_items="center"))
        self.plan = widgets.HTML(layout=widgets.Layout(flex="1 1 320px", min_width="0"))
        self.sums = widgets.HTML(layout=widgets.Layout(flex="0 1 auto"))
        self.back = self.button("Back", lambda: self.on_go(self.step - 1))
        self.next = self.button("Next", lambda: self.on_go(self.step + 1))
        self.start = widgets.Button(description="Start", tooltip="Train with these settings")
        self.start.add_class("nt-primary")
        self.form = widgets.VBox([self._told, self._body(), self._foot()])
        self.run_box = widgets.VBox()
        card = widgets.VBox([self._head(), self.form, self.status, self.notice])
        for name in ("nbtune", "nt-card"):
            card.add_class(name)
        self.widget = widgets.VBox([style(), card, self.run_box])
        self.widget.add_class("nbtune")

    def button(self, text: str, act: Act, tooltip: str = "") -> widgets.Button:
        """A button that does something and shows the error where it cannot."""
        button = widgets.Button(description=text, tooltip=tooltip or None)
        button.on_click(self._act(act))
        return button

    def go(self, step: int) -> None:
        """Show a step."""
        self.step = step
        self.form.layout.display = None
        for number, (pill, page) in enumerate(zip(self.pills, self._pages, strict=True)):
            page.layout.display = None if number == step else "none"
            set_class(pill, "nt-here", on=number == step)
        self.back.disabled = step == 0
        shown = STEPS[step]
        for part, where in ((self.plan, STEPS[:4]), (self.sums, STEPS[:4]), (self.next, STEPS[:4]),
                            (self.start, STEPS[:5])):  # fmt: skip
            part.layout.display = None if shown in where else "none"

    def show_run(self, *inside: widgets.DOMWidget) -> None:
        """Fold the form away and show a run in its place; a click on a step brings the form back."""
        self.run_box.children = inside
        self.form.layout.display = "none"

    def mark(self, wrong: Collection[int]) -> None:
        """Mark the steps: wrong, done, or to come."""
        for number, pill in enumerate(self.pills):
            mark = "! " if number in wrong else "✓ " if number < self.step else ""
            pill.description = f"{mark}{number + 1} {STEPS[number]}"
            set_class(pill, "nt-wrong", on=number in wrong)

    def tell(self, html: str) -> None:
        """Show above the page what was changed, with a button that undoes it; "" for nothing."""
        self.told.value = html
        self._told.layout.display = None if html else "none"

    def _undo(self) -> None:
        self.on_undo()

    def say(self, text: str) -> None:
        """Say what is being done."""
        self.status.value = (
            f'<div class="nt-working nt-soft nt-small" role="status">{escape(text)}</div>' if text else ""
        )

    def complain(self, texts: Collection[str]) -> None:
        """Show what went wrong."""
        self.notice.value = "".join(notice(text, "error") for text in texts)

    def _head(self) -> widgets.Box:
        name = widgets.HTML('<span class="nt-name" style="font-size:16px;margin-right:8px">nbtune</span>')
        head = widgets.HBox([name, *self.pills, self.machine], layout=widgets.Layout(**_WRAP))
        head.add_class("nt-head")
        return head

    def _body(self) -> widgets.Box:
        return widgets.VBox(self._pages, layout=widgets.Layout(min_height="180px", padding="10px 0"))

    def _foot(self) -> widgets.Box:
        buttons = widgets.HBox([self.back, self.next, self.start], layout=widgets.Layout(**_WRAP))
        buttons.add_class("nt-buttons")
        foot = widgets.HBox([self.plan, self.sums, buttons], layout=widgets.Layout(**_WRAP, justify_content="flex-end"))
        foot.add_class("nt-foot")
        return foot


def set_class(widget: widgets.DOMWidget, name: str, *, on: bool) -> None:
    (widget.add_class if on else widget.remove_class)(name)


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if "sched_getaffinity" in dir(os) else os.cpu_count() or 1


def machine() -> str:
    """2 cores · 23.4 GB free · bf16 · no GPU. Imports torch."""
    import torch

    from nbtune.models import available_memory, compute_dtype, default_device

    device = default_device()
    dtype = {"torch.bfloat16": "bf16", "torch.float32": "fp32"}[str(compute_dtype("auto", device))]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    return f"{cores()} cores · {gigabytes(available_memory(device))} free · {dtype} · {gpu}"
