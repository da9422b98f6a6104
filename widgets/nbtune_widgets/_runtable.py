"""Rows of the table of runs: what is known of a run at one moment, how it is sorted and how it is written in HTML."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from nbtune_widgets import _summary, charts
from nbtune_widgets._style import gigabytes

if TYPE_CHECKING:
    from nbtune.run import Run

GRID = "minmax(130px,1.9fr) 96px 84px minmax(104px,1fr) 62px 62px 48px"  # a column for each of COLUMNS
CSS = f"""
.nbtune .nt-grid{{display:grid!important;grid-template-columns:{GRID};gap:0 8px;align-items:center;
 width:100%;min-width:0}}
.nbtune .nt-run{{border-top:1px solid var(--nt-line);min-height:46px;align-items:center;width:100%}}
.nbtune .nt-run:hover{{background:var(--nt-wash)}}
.nbtune .nt-run .widget-html-content,.nbtune .nt-run .jupyter-widget-html-content{{width:100%}}
.nbtune .nt-run .widget-checkbox,.nbtune .nt-run .jupyter-widget-checkbox{{padding-left:4px}}
.nbtune .nt-cut{{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;min-width:0}}
.nbtune .nt-sort button.jupyter-button{{border-color:transparent;background:transparent;padding:0;text-align:left;
 color:var(--nt-soft);font-size:12px;height:26px;line-height:24px;min-width:0;margin:0}}
.nbtune .nt-sort button.jupyter-button.nt-on{{color:var(--nt-blue);font-weight:600}}
.nbtune .nt-state i{{display:inline-block;width:8px;height:8px;border-radius:4px;margin-right:6px}}
.nbtune .nt-compared{{overflow-x:auto;margin:6px 0}}
.nbtune .nt-compared table{{border-collapse:collapse;font-size:12px;color:var(--nt-ink)}}
.nbtune .nt-compared th,.nbtune .nt-compared td{{text-align:left;padding:4px 18px 4px 0;vertical-align:top;
 border-bottom:1px solid var(--nt-line);background:none;max-width:260px;overflow-wrap:anywhere;font-weight:400}}
.nbtune .nt-compared thead th{{font-weight:600}}
.nbtune .nt-compared i{{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px}}
"""
_STATE_COLORS = {
    "running": charts.BLUE, "paused": charts.ORANGE, "finished": charts.GREEN, "failed": "#d9534f",
    "interrupted": "#d9534f", "stopped": charts.SLATE, "created": charts.BLUE,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a run at one moment."""

    id: str
    name: str
    setting: str
    note: str
    status: str
    steps: int
    total_steps: int | None
    loss: str  # before and after, for a person
    last_loss: float | None
    tokens_per_second: float | None
    peak_bytes: float | None
    started: float | None  # unix seconds
    spark: str  # SVG


@dataclasses.dataclass(frozen=True)
class Column:
    name: str
    key: Callable[[Facts], Any]  # None where a run has no such value: it stands last, whatever the direction
    cell: Callable[[Facts], str]  # HTML


def read(run: Run) -> Facts:
    """Look at a run. Raises NbtuneError where its folder is damaged."""
    summary, events, about = run.summary(), run.events(), run.about
    losses = (summary.get("eval_loss_after"), summary.get("train_loss"))
    return Facts(
        id=run.id,
        name=run.name,
        setting=_summary.title(run.spec),
        note=about.note,
        status=run.status,
        steps=summary["steps"],
        total_steps=summary["total_steps"],
        loss=_summary.change(summary),
        last_loss=next((loss for loss in losses if loss is not None), None),
        tokens_per_second=summary["train_tokens_per_second"],
        peak_bytes=summary["measured_peak_bytes"],
        started=summary["started"],
        spark=charts.spark(events),
    )


def ordered(facts: Sequence[Facts], column: Column, *, descending: bool) -> list[Facts]:
    """Sorted by a column; runs without a value come last."""
    known = [fact for fact in facts if column.key(fact) is not None]
    return sorted(known, key=column.key, reverse=descending) + [fact for fact in facts if column.key(fact) is None]


def row(facts: Facts) -> str:
    """One run as a row of the grid."""
    return f'<div class="nt-grid">{"".join(f"<div>{column.cell(facts)}</div>" for column in COLUMNS)}</div>'


def plain(facts: Sequence[Facts]) -> str:
    """All runs as a table without a kernel and without our style block."""

    def line(kind: str, cells: Sequence[str]) -> str:
        look = "padding:3px 14px 3px 0;text-align:left;border:0"
        return f"<tr>{''.join(f'<{kind} style={look!r}>{cell}</{kind}>' for cell in cells)}</tr>"

    head = line("th", [column.name for column in COLUMNS])
    body = "".join(line("td", [column.cell(fact) for column in COLUMNS]) for fact in facts)
    look = "border:0;border-collapse:collapse;font-size:13px"
    return f'<table style="{look}"><thead>{head}</thead><tbody>{body}</tbody></table>'


def compared(names: Sequence[str], difference: dict[str, list[Any]]) -> str:
    """The settings in which runs differ, a column for each run under the colour of its curve."""
    swatches = "".join(
        f'<th><i style="background:{charts.COLORS[index % len(charts.COLORS)]}"></i>{escape(name)}</th>'
        for index, name in enumerate(names)
    )
    rows = "".join(
        f'<tr><th class="nt-soft">{escape(path)}</th>{"".join(f"<td>{_value(value)}</td>" for value in values)}</tr>'
        for path, values in difference.items()
    )
    same = "" if difference else '<div class="nt-soft">Their settings are the same.</div>'
    table = f"<table><thead><tr><th></th>{swatches}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="nt-compared">{table}{same}</div>'


def age(started: float | None) -> str:
    """How long ago: 3 min, 2 h, 5 days."""
    if started is None:
        return ""
    seconds = max(0.0, time.time() - started)
    for size, unit in ((86_400, "day"), (3600, "h"), (60, "min")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if unit == 'day' and count > 1 else ''}"
    return f"{seconds:.0f} s"


def _value(value: Any) -> str:
    return '<span class="nt-soft">–</span>' if value is None else escape(str(value))


def _name(facts: Facts) -> str:
    note = f' title="{escape(facts.note)}"' if facts.note else ""
    mark = ' <span class="nt-soft" aria-label="has a note">✎</span>' if facts.note else ""
    return (
        f'<div class="nt-cut nt-b"{note}><span title="{escape(facts.id)}">{escape(facts.name)}</span>{mark}</div>'
        f'<div class="nt-cut nt-soft nt-small" title="{escape(facts.setting)}">{escape(facts.setting)}</div>'
    )


def _state(facts: Facts) -> str:
    color = _STATE_COLORS.get(facts.status, charts.SLATE)
    steps = f"{facts.steps} of {facts.total_steps}" if facts.total_steps else ""
    return (
        f'<div class="nt-state" style="white-space:nowrap"><i style="background:{color}"></i>{facts.status}</div>'
        f'<div class="nt-soft nt-small">{steps}</div>'
    )


def _number(value: float | None, text: Callable[[float], str]) -> str:
    return "" if value is None else text(value)


def _loss(facts: Facts) -> str:
    if facts.loss:
        before, bracket, by = facts.loss.partition(" (")
        return f'{before}<div class="nt-soft nt-small">{by.rstrip(")")}</div>' if bracket else before
    return _number(facts.last_loss, lambda loss: f'{loss:.3f}<div class="nt-soft nt-small">training</div>')


COLUMNS = (
    Column("Run", lambda facts: facts.name.lower(), _name),
    Column("Loss", lambda facts: facts.last_loss, lambda facts: facts.spark),
    Column("Status", lambda facts: (facts.status not in ("running", "paused"), facts.status), _state),
    Column("Held out", lambda facts: facts.last_loss, _loss),
    Column("Tokens/s", lambda facts: facts.tokens_per_second, lambda f: _number(f.tokens_per_second, "{:,.0f}".format)),
    Column("Memory", lambda facts: facts.peak_bytes, lambda facts: _number(facts.peak_bytes, gigabytes)),
    Column("Age", lambda facts: None if facts.started is None else -facts.started, lambda facts: age(facts.started)),
)
