"""One row of the data to look at: as the model reads it, every token with its loss, or as it stands in the source.

preview = RowPreview(host)
preview.show(report)          # the first row that is used
preview.number.value = 17     # row 17 of the source
"""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import numpy as np

from nbtune_widgets import _tokens
from nbtune_widgets._page import Host

if TYPE_CHECKING:
    from nbtune.data.report import DataReport

AT_ONCE = 20_000  # tokens that are read again within a click
SHOWN = 8_000  # characters of a row as it is in the source


class RowPreview:
    """Rows by their number in the source; the arrows go to the next row that is used."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.busy = False  # the tokenizer is in use on another thread
        self._report: DataReport | None = None
        self._order: list[int] = []  # numbers of the rows that are used, ascending
        self._held_out: set[int] = set()
        self._showing = False
        self.text = widgets.HTML()
        self.note = widgets.HTML()
        self.number = widgets.BoundedIntText(
            description="row", value=1, min=1, max=1, layout=widgets.Layout(width="104px"),
            style={"description_width": "28px"}, tooltip="Its number in the source")  # fmt: skip
        self.of = widgets.HTML()
        self.back = host.button("‹", lambda: self.step(-1), "The row before that is used")
        self.next = host.button("›", lambda: self.step(1), "The next row that is used")
        self.raw = widgets.ToggleButton(description="as in the source", tooltip="The row as it was read")
        self.number.observe(host.act(self._draw), names="value")
        self.raw.observe(host.act(self._draw), names="value")
        legend = widgets.HTML(f'<div class="nt-small">{_tokens.LEGEND}</div>', layout=widgets.Layout(flex="1 1 auto"))
        below = [_line([legend, self.note]), _line([self.number, self.of, self.back, self.next, self.raw])]
        self.widget = widgets.VBox([self.text, *below], layout=widgets.Layout(flex="3 1 440px", min_width="0"))
        self.close()

    def close(self) -> None:
        """Nothing to look at: what was shown is no longer so."""
        self._report = None
        self.widget.layout.display = "none"

    def show(self, report: DataReport, *, first: bool = False) -> None:
        """Look at these rows; the number stays, unless the first that is used is asked for."""
        self._order = np.unique(report.numbers).tolist()
        used = list(dict.fromkeys(report.numbers.tolist()))  # training rows first
        self._held_out = set(used[report.train :])
        self._showing = True
        self.number.max = report.total
        if first:
            self.number.value = self._order[0] if self._order else 1
        self._showing = False
        self._report = report
        self.of.value = f'<span class="nt-soft nt-small">of {report.total:,}</span>'
        self.widget.layout.display = None
        self._draw()

    def step(self, by: int) -> None:
        """As a click on an arrow: the next row that is used, or the one before, round and round."""
        if not self._order:
            return
        place = int(np.searchsorted(self._order, self.number.value, side="right" if by > 0 else "left"))
        self.number.value = self._order[(place if by > 0 else place - 1) % len(self._order)]

    def _draw(self) -> None:
        report = self._report
        if report is None or self._showing:
            return
        number = self.number.value
        examples = np.flatnonzero(report.numbers == number).tolist()
        if self.raw.value or not examples:
            self.text.value = _raw(report.raw(number))
            self.note.value = "" if examples else _said(_why_not(report, number))
            return
        if self.busy or report.lengths[examples].sum() > AT_ONCE:
            self._host.ask("row", "Reading the row …", lambda: self._read(report, number, examples))
        else:
            self._read(report, number, examples)

    def _read(self, report: DataReport, number: int, examples: list[int]) -> None:
        """Show a row's examples: one, or one for each turn."""
        parts, tokens, learnt = [], 0, 0
        # Plain text goes on in the next example; the end of anything else is cut away.
        limit = int(report.lengths.max()) if report.chat(number).raw else report.max_length
        for place, index in enumerate(examples, start=1):
            pieces = report.pieces(index)
            tokens += len(pieces)
            learnt += sum(piece.kind != "context" for piece in pieces[:limit])
            heading = f'<span class="nt-part">example {place} of {len(examples)}</span>' if len(examples) > 1 else ""
            parts.append(heading + _tokens.row(pieces, limit))
        if report is not self._report or number != self.number.value:  # asked for another one meanwhile
            return
        self.text.value = f'<div class="nt-tokens" tabindex="0" aria-label="Row {number}">{"".join(parts)}</div>'
        use = "held out" if number in self._held_out else "trained on"
        self.note.value = _said(f"{use} · {tokens:,} tokens, {learnt:,} with loss")


def _line(children: list[widgets.DOMWidget]) -> widgets.HBox:
    line = widgets.HBox(children, layout=widgets.Layout(flex_flow="row wrap"))
    line.add_class("nt-look")
    return line


def _why_not(report: DataReport, number: int) -> str:
    for reasons in (report.dropped, report.unusable):
        for reason, numbers in reasons.items():
            if number in numbers:
                return f"not used: {reason}"
    return "not used: other rows were chosen"


def _said(text: str) -> str:
    return f'<span class="nt-soft nt-small" role="status">{escape(text)}</span>'


def _raw(row: dict[str, Any]) -> str:
    return f'<div class="nt-tokens" tabindex="0">{escape(as_json(row, SHOWN))}</div>'


def as_json(row: dict[str, Any], at_most: int) -> str:
    """A row as indented JSON, cut after so many characters."""
    text = json.dumps(row, ensure_ascii=False, indent=2, default=str)
    return text if len(text) <= at_most else f"{text[:at_most]}\n… {len(text) - at_most:,} more characters"
