"""Rows that are left out, by reason, each reason with some of its rows to unfold."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from nbtune_widgets.preview import as_json

if TYPE_CHECKING:
    from nbtune.data.report import DataReport

SHOWN_ROWS = 3  # of each reason, as they are in the source
SHOWN_NUMBERS = 40
_CHARACTERS = 700  # of one row


def folds(report: DataReport) -> str:
    """A fold for each reason; "" where every row is used."""
    left_out = [*report.unusable.items(), *report.dropped.items()]
    return "".join(_fold(report, reason, numbers) for reason, numbers in left_out if numbers)


def _fold(report: DataReport, reason: str, numbers: Sequence[int]) -> str:
    count = f"{len(numbers):,} row{'' if len(numbers) == 1 else 's'} left out"
    rows = "".join(
        f'<div class="nt-soft nt-small">{escape(report.place(number))}</div>'
        f"<pre>{escape(as_json(report.raw(number), _CHARACTERS))}</pre>"
        for number in numbers[:SHOWN_ROWS]
    )
    others = numbers[SHOWN_ROWS:SHOWN_NUMBERS]
    more = f"also row{'s' if len(others) > 1 else ''} {', '.join(f'{n:,}' for n in others)}" if others else ""
    more += f" and {len(numbers) - SHOWN_NUMBERS:,} more" if len(numbers) > SHOWN_NUMBERS else ""
    tail = f'<div class="nt-soft nt-small">{more}</div>' if more else ""
    return f'<details class="nt-fold"><summary>{count}: {escape(reason)}</summary>{rows}{tail}</details>'
