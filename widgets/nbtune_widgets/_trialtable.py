"""Rows of a sweep's leaderboard: what is known of a trial at one moment, and how it is written in HTML."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nbtune.plan import format_bytes
from nbtune.run import Run
from nbtune.sweep.preview import Forecast, show
from nbtune.sweep.space import Point
from nbtune.sweep.trial import UNSUCCESSFUL, Trial
from nbtune_widgets import _reports, charts

RED = "#d9534f"
COLORS: dict[str, str] = {
    "running": charts.BLUE, "finished": charts.GREEN, "failed": RED, "died": RED, "timed out": RED,
    "stopped": charts.SLATE, "stopped early": charts.SLATE, "refused": charts.SLATE, "waiting": "transparent",
}  # fmt: skip
CSS = """
.nbtune .nt-board{display:grid!important;gap:0 8px;align-items:center;width:100%;min-width:0;padding:6px 0}
.nbtune .nt-trials .nt-trial{border-top:1px solid var(--nt-line);min-height:35px;align-items:center;width:100%}
.nbtune .nt-trials .nt-trial:hover{background:var(--nt-wash)}
.nbtune .nt-trial .widget-html-content,.nbtune .nt-trial .jupyter-widget-html-content{width:100%}
.nbtune .nt-trial .widget-html,.nbtune .nt-trial .jupyter-widget-html{margin-top:0;margin-bottom:0}
.nbtune .nt-board a{color:inherit;text-decoration:underline;text-decoration-color:var(--nt-line);
 text-underline-offset:3px}
.nbtune .nt-board a:hover{color:var(--nt-blue)}
.nbtune .nt-board>div,.nbtune .nt-cut{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;min-width:0}
.nbtune .nt-board .nt-num{text-align:right;font-variant-numeric:tabular-nums}
.nbtune .nt-boardhead{color:var(--nt-soft);font-size:12px;padding:0 0 2px}
.nbtune .nt-mark{display:inline-block;width:8px;height:8px;border-radius:4px;margin-right:7px;box-sizing:border-box}
.nbtune .nt-star{color:var(--nt-amber);margin-left:5px}
.nbtune .nt-trial.nt-best .nt-board{font-weight:600}
.nbtune .nt-way{display:flex;align-items:center;gap:7px}
.nbtune .nt-board>.nt-steps{padding-left:8px}
.nbtune .nt-way i{flex:1 1 30px;height:6px;border-radius:3px;background:var(--nt-line);overflow:hidden}
.nbtune .nt-way i b{display:block;height:6px;border-radius:3px;background:var(--nt-blue)}
.nbtune .nt-trial details{grid-column:1/-1;white-space:normal;padding:3px 0 0 15px;font-size:12px;font-weight:400}
.nbtune .nt-trial summary{cursor:pointer;color:var(--nt-red);overflow:hidden;text-overflow:ellipsis;
 white-space:nowrap}
.nbtune button.jupyter-button.nt-small{height:24px;line-height:22px;padding:0 9px;font-size:12px;margin:0 0 0 8px}
.nbtune .nt-tiles{display:flex;flex-wrap:wrap;gap:6px 34px;padding:8px 2px 12px}
.nbtune .nt-tile{min-width:0;max-width:100%}
.nbtune .nt-tile b{display:block;font-size:19px;line-height:1.25;font-weight:600;color:var(--nt-ink);
 font-variant-numeric:tabular-nums}
.nbtune .nt-tile span{color:var(--nt-soft);font-size:12px}
.nbtune .nt-legend{display:flex;flex-wrap:wrap;gap:0 16px;font-size:12px;color:var(--nt-soft)}
.nbtune .nt-legend i{display:inline-block;width:16px;height:3px;border-radius:2px;margin:0 6px 3px 0}
.nbtune .nt-ask input[type=number]{color:var(--nt-ink)!important;background-color:var(--nt-card)!important;
 border:1px solid var(--nt-line)!important;border-radius:6px}
.nbtune .nt-ask{padding:10px 12px;border:1px solid var(--nt-line);border-radius:8px;margin:6px 0}
"""
_ORDER = {"running": 1, "failed": 2, "died": 2, "timed out": 2, "waiting": 3, "stopped": 4, "stopped early": 4,
          "refused": 5}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a trial at one moment."""

    number: int
    state: str
    params: Point
    value: float | None = None  # of the metric; of a running one so far
    step: int = 0
    total_steps: int | None = None
    doing: str = ""
    seconds: float | None = None  # so far, or in all
    left_seconds: float | None = None  # of a running one
    predicted_seconds: float | None = None
    predicted_bytes: int | None = None
    error: str = ""
    link: str = ""  # to its notebook, from where this notebook is

    @property
    def name(self) -> str:
        return f"{self.number:03d}"

    @property
    def counts(self) -> bool:
        """Whether it can be the best: it ended well and has the metric."""
        return self.value is not None and self.state in ("finished", "stopped", "stopped early")


def read(trial: Trial, run: Run | None, metric: str, began: float | None) -> Facts:
    """Look at a trial, and at its run while that goes on. `began` is when it started, in unix seconds."""
    facts = Facts(
        trial.number, trial.state, trial.params, trial.metrics.get(metric), int(trial.metrics.get("steps", 0)),
        seconds=trial.seconds, predicted_seconds=trial.predicted_seconds, predicted_bytes=trial.predicted_bytes,
        error=trial.error or "", link=link(trial.notebook),
    )  # fmt: skip
    if trial.state != "running":
        return facts
    seconds = None if began is None else max(0.0, time.time() - began)
    if run is None:
        return dataclasses.replace(facts, doing="starting", seconds=seconds)
    progress, summary = run.progress(), run.summary()
    return dataclasses.replace(
        facts, value=summary.get(metric), step=progress.step, total_steps=progress.total_steps,
        doing=progress.message, seconds=seconds, left_seconds=progress.eta_seconds,
    )  # fmt: skip


def to_come(number: int, point: Point, forecast: Forecast) -> Facts:
    """A trial of a sweep that has not begun."""
    return Facts(
        number, "refused" if forecast.refused else "waiting", point, predicted_seconds=forecast.seconds,
        predicted_bytes=forecast.peak_bytes, error=forecast.refused,
    )  # fmt: skip


def link(notebook: Path) -> str:
    """From this notebook, whose folder is this process's, to another; "" while it is not there."""
    return quote(Path(os.path.relpath(notebook)).as_posix()) if notebook.exists() else ""


def ordered(facts: Sequence[Facts], *, maximise: bool) -> list[Facts]:
    """The best first, then what runs, what went wrong, what waits, and what was never to be."""
    sign = -1 if maximise else 1

    def place(one: Facts) -> tuple[int, float, int]:
        if one.counts:
            return (0, sign * (one.value or 0.0), one.number)
        return (_ORDER.get(one.state, 4), 0.0, one.number)

    return sorted(facts, key=place)


def told(params: Mapping[str, Any], name: str) -> str:
    """A trial in a line, for a chart: its text is HTML to Plotly, and a %{ would be a formula."""
    settings = ", ".join(f"{_short(key)} {show(value)}" for key, value in params.items())
    return escape(f"{name} · {settings}").replace("%{", "{")


def left(facts: Sequence[Facts], jobs: int, to_come: int) -> float | None:
    """Seconds until all trials have ended, as far as can be told from those that did, or from the plan."""
    # Of a trial that ended, what it took; of one that runs, what it is going to take.
    took = [
        ((one.seconds or 0.0) + (one.left_seconds or 0.0), one.predicted_seconds or 0.0)
        for one in facts
        if one.state == "finished" or one.left_seconds is not None
    ]
    total, planned = (sum(column) for column in zip(*took, strict=True)) if took else (0.0, 0.0)
    mean = total / len(took) if took else None
    slower = total / planned if planned else 1.0

    def expected(one: Facts) -> float | None:
        return one.predicted_seconds * slower if one.predicted_seconds else mean

    running = [one for one in facts if one.state == "running"]
    waiting = [expected(one) for one in facts if one.state == "waiting"] + [mean] * to_come
    known = [one.left_seconds if one.left_seconds is not None else expected(one) for one in running]
    if None in waiting or None in known:
        return None
    rest = [
        seconds or 0.0 if one.left_seconds is not None else max(0.0, (seconds or 0.0) - (one.seconds or 0.0))
        for one, seconds in zip(running, known, strict=True)
    ]
    work = sum(rest) + sum(seconds or 0.0 for seconds in waiting)
    return max([work / max(1, jobs), *rest]) if rest or waiting else None


def tiles(facts: Sequence[Facts], best: Facts | None, seconds: float | None, to_come: int, *, running: bool) -> str:
    """The headline: how many trials, how they stand, the best so far, the time left."""
    count = Counter(one.state for one in facts)
    wrong = sum(count[state] for state in UNSUCCESSFUL)
    others = {"running": count["running"], "waiting": count["waiting"] + to_come, "went wrong": wrong,
              "refused": count["refused"]}  # fmt: skip
    rest = [f"{number} {word}" for word, number in others.items() if number]
    done = len(facts) - wrong - count["waiting"] - count["running"] - count["refused"]
    shown = [(f"{done} of {len(facts) + to_come}", " · ".join(["trials done", *rest]))]
    if running:
        shown.append((f"≈ {clock(seconds)}" if seconds is not None else "…", "left"))
    if best is not None and best.value is not None:
        settings = ", ".join(f"{_short(name)} {show(value)}" for name, value in best.params.items())
        words = "best so far" if running else "the best"
        shown.append((f"{best.value:.4g}", f"{words}: {best.name}, {settings}"))
    cells = "".join(
        f'<div class="nt-tile"><b>{escape(text)}</b><span>{escape(word)}</span></div>' for text, word in shown
    )
    return f'<div class="nt-tiles">{cells}</div>'


def clock(seconds: float) -> str:
    """0:48, 3:20, 2:05:00: as narrow as a column."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def figure(value: float) -> str:
    """A metric in a column: losses have four decimals, so that they stand under each other."""
    return f"{value:.4f}" if 0.01 <= abs(value) < 1000 else f"{value:.5g}"


def names(facts: Sequence[Facts]) -> list[str]:
    """The settings, in the order in which the space has them."""
    return list(dict.fromkeys(name for one in facts for name in one.params))


def head(settings: Sequence[str], widths: Sequence[int], metric: str) -> str:
    cells = [*(("", _short(name), name) for name in settings), ("nt-num", metric, metric)]
    shown = "".join(f'<div class="{css}" title="{escape(full)}">{escape(name)}</div>' for css, name, full in cells)
    start = '<div style="padding-left:15px">Trial</div><div>State</div>'
    end = '<div class="nt-steps">Steps</div><div class="nt-num">Time</div>'
    return f'<div class="nt-board nt-boardhead" style="{_grid(widths)}">{start}{shown}{end}</div>'


def row(facts: Facts, settings: Sequence[str], widths: Sequence[int], best: Facts | None) -> str:
    """One trial as a row of the grid, and below it why it went wrong."""
    is_best = best is not None and best.number == facts.number
    star = '<span class="nt-star" title="the best">★</span>' if is_best else ""
    name = _linked(facts)
    values = "".join(
        f'<div title="{escape(_value(facts, key))}">{escape(_value(facts, key))}</div>' for key in settings
    )
    start = f"<div>{mark(facts.state)}{name}{star}</div><div>{facts.state}</div>{values}"
    if facts.state == "refused":
        end = f'<div class="nt-soft" style="grid-column:span 3">{escape(facts.error)}</div>'
    else:
        time = f'<div class="nt-num nt-soft">{_time(facts)}</div>'
        end = (
            f'<div class="nt-num">{_metric(facts)}</div><div class="nt-steps">{_steps(facts)}</div>{time}{_why(facts)}'
        )
    return f'<div class="nt-board" style="{_grid(widths)}">{start}{end}</div>'


def mark(state: str) -> str:
    """The coloured dot before a trial; a ring of one that waits."""
    ring = f"border:1.5px solid {charts.SLATE};" if state == "waiting" else ""
    look = f"display:inline-block;width:8px;height:8px;border-radius:4px;margin-right:7px;{ring}"
    return f'<i class="nt-mark" style="{look}background:{COLORS[state]}"></i>'


def plain(facts: Sequence[Facts], best: Facts | None, metric: str, sentence: str) -> str:
    """All trials as a table without a kernel and without our style block."""
    settings = names(facts)
    cell = "padding:4px 16px 4px 0;text-align:left;vertical-align:top;border:0;background:none"

    def line(kind: str, cells: Sequence[str], look: str = "") -> str:
        first = ";white-space:nowrap"
        inside = "".join(
            f'<{kind} style="{cell};{look}{"" if place else first}">{text}</{kind}>' for place, text in enumerate(cells)
        )
        return f'<tr style="background:none">{inside}</tr>'

    columns = [
        "Trial",
        "State",
        *(escape(_short(name)) for name in settings),
        escape(metric),
        "Steps",
        "Time",
    ]
    rows = []
    for one in facts:
        is_best = best is not None and best.number == one.number
        why = _reports.folded(_first_line(one.error), one.error) if one.state != "refused" else f": {escape(one.error)}"
        rows.append(
            line(
                "td",
                [
                    f"{mark(one.state)}{_linked(one)}{' ★' if is_best else ''}",
                    f"{one.state}{why}",
                    *(escape(_value(one, name)) for name in settings),
                    figure(one.value) if one.value is not None else "",
                    str(one.step or ""),
                    _time(one),
                ],
                "font-weight:600" if is_best else "",
            )
        )
    look = "border:0;border-collapse:collapse;font-size:13px;margin:4px 0 0 6px"
    header = line("th", columns, "font-weight:600;opacity:.7")
    return (
        f'<div style="margin:2px 0 4px 6px;font-size:13px">{sentence}</div>'
        f'<table style="{look}"><thead>{header}</thead><tbody>{"".join(rows)}</tbody></table>'
    )


def text(facts: Sequence[Facts], best: Facts | None, metric: str) -> str:
    """As lines, for where there is no HTML."""
    lines = []
    for one in facts:
        settings = ", ".join(f"{name}={show(value)}" for name, value in one.params.items())
        value = f"{metric} {one.value:.4g}" if one.value is not None else _first_line(one.error)
        star = "* " if best is not None and best.number == one.number else "  "
        lines.append(f"{star}{one.name} {one.state}: {settings}; {value}".rstrip("; "))
    return "\n".join(lines)


def _grid(widths: Sequence[int]) -> str:
    """The columns: those of the settings share what is left, by the length of what stands in them."""
    settings = " ".join(f"minmax(0,{width + 1}fr)" for width in widths)
    return f"grid-template-columns:64px 74px {settings} 98px 92px 50px"


def widths(facts: Sequence[Facts], settings: Sequence[str]) -> list[int]:
    """How many characters each setting's column should hold."""
    longest = [max(len(_value(one, name)) for one in facts) for name in settings]
    return [min(18, max(length, len(_short(name)), 3)) for name, length in zip(settings, longest, strict=True)]


def _short(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _linked(facts: Facts) -> str:
    if not facts.link:
        return facts.name
    return f'<a href="{escape(facts.link)}" target="_blank" rel="noopener" title="Open its notebook">{facts.name}</a>'


def _value(facts: Facts, name: str) -> str:
    return show(facts.params[name]) if name in facts.params else ""


def _metric(facts: Facts) -> str:
    if facts.value is None:
        return ""
    if facts.state == "running":
        return f'<span class="nt-soft" title="so far">{figure(facts.value)} …</span>'
    return figure(facts.value)


def _steps(facts: Facts) -> str:
    if facts.state != "running":
        return f'<span class="nt-soft">{facts.step}</span>' if facts.step else ""
    if not facts.step or not facts.total_steps:
        return f'<span class="nt-soft" title="{escape(facts.doing)}">{escape(facts.doing)}</span>'
    share = min(1.0, facts.step / facts.total_steps)
    return (
        f'<div class="nt-way"><i><b style="width:{100 * share:.0f}%"></b></i>'
        f'<span class="nt-small">{facts.step}/{facts.total_steps}</span></div>'
    )


def _time(facts: Facts) -> str:
    if facts.seconds is not None:
        return clock(facts.seconds)
    if facts.predicted_seconds is not None and facts.state == "waiting":
        memory = f", {format_bytes(facts.predicted_bytes)}" if facts.predicted_bytes is not None else ""
        return f'<span title="planned: training alone{memory}">≈ {clock(facts.predicted_seconds)}</span>'
    return ""


def _why(facts: Facts) -> str:
    if not facts.error:
        return ""
    where = f'<div class="nt-soft" style="margin-top:3px">All of it is in {_linked(facts)}.</div>' if facts.link else ""
    return (
        f"<details><summary>{escape(_first_line(facts.error))}</summary><pre>{escape(facts.error.strip())}</pre>"
        f"{where}</details>"
    )


def _first_line(error: str) -> str:
    """The line of an error that says the most: papermill's and Python's come last."""
    lines = [line for line in error.strip().splitlines() if line.strip()]
    return next((line for line in lines[1:] if not line.startswith(" ")), lines[0]) if lines else ""
