"""The charts of a sweep: the losses of all trials over each other, and what the settings have to do with the metric.

    bundle = sweepcharts.bundle(curves, space, importances)

As in `charts.py`: pure functions, a plain dict of Plotly's, and an SVG twin for where nothing renders Plotly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from nbtune.sweep.importance import FEWEST, Importance
from nbtune.sweep.preview import show
from nbtune.sweep.space import Range, Space
from nbtune_widgets import _svg, charts
from nbtune_widgets.charts import GRID, MARGIN, SLATE, Event, Panel, Point, Trace

BEST, RUNNING = charts.ORANGE, charts.BLUE
CURVES_HEIGHT, HEIGHT = charts.HEIGHT, 570  # pixels: of the curves alone, and with the settings below them
POINTS = 6000  # of all curves, in the figure
SVG_POINTS = 1600
_CURVES, _BELOW = (0.555, 1.0), (0.0, 0.37)  # shares of the height
_AXES, _BARS = (0.0, 0.6), (0.735, 1.0)  # shares of the width
SHOWN_TICKS, SHOWN_BARS = 7, 6
SPREAD = 0.05  # how far trials with one value are drawn apart, as a share of the axis
_LEFT, _RIGHT, _MIDDLE = ("right", -6), ("left", 6), ("center", 0)


@dataclass(frozen=True)
class Curve:
    """The losses of one trial."""

    told: str  # "003 · r 8"
    training: Sequence[Point]
    held_out: Sequence[Point]
    is_best: bool = False
    is_running: bool = False


@dataclass(frozen=True)
class Measured:
    """A trial that has the metric."""

    told: str
    params: Mapping[str, Any]
    value: float
    is_best: bool = False


@dataclass(frozen=True)
class Axis:
    """A vertical axis of the parallel coordinates: what is written at which height, 0 to 1."""

    name: str
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Line:
    """A trial across all axes: its height on each, None where it has no value."""

    told: str
    heights: Sequence[float | None]
    color: str
    width: float


@dataclass(frozen=True)
class Drawing:
    """All that is drawn."""

    panels: Sequence[Panel]
    axes: Sequence[Axis]
    lines: Sequence[Line]
    bars: Sequence[Importance]

    @property
    def height(self) -> int:
        return HEIGHT if self.lines else CURVES_HEIGHT


def losses(events: Sequence[Event]) -> tuple[list[Point], list[Point]]:
    """The smoothed training loss and the held-out loss by step."""
    training = charts.series([event for event in events if event["type"] == "train"], "loss")
    held_out = charts.series([event for event in events if event["type"] == "eval"], "eval_loss")
    return charts.smoothed(training, charts.View.smoothing), held_out


def draw(
    curves: Sequence[Curve],
    measured: Sequence[Measured],
    space: Space,
    bars: Sequence[Importance],
    metric: str,
    *,
    maximise: bool = False,
    log: bool = False,
) -> Drawing:
    """What there is to be seen; the settings only of two trials and more."""
    below = len(measured) > 1
    axes, lines = parallel(measured, space, metric, maximise=maximise) if below else ([], [])
    return Drawing(_panels(curves, log=log, below=below), axes, lines, bars[:SHOWN_BARS] if below else [])


def bundle(drawing: Drawing) -> dict[str, Any]:
    """As `{mime type: content}`, for `display(..., raw=True)` or `Output.outputs`."""
    told = [f"{panel.name} of {len(panel.traces)} trials" for panel in drawing.panels]
    told += [f"{bar.name} explains {bar.share:.0%}" for bar in drawing.bars]
    panels = [_thinned(panel, SVG_POINTS) for panel in drawing.panels]
    return {
        charts.PLOTLY: figure(drawing),
        "image/svg+xml": _svg.draw(panels, drawing.height, MARGIN, charts.TEXT, beside=_svg_below(drawing)),
        "text/plain": " | ".join(told),
    }


def figure(drawing: Drawing) -> dict[str, Any]:
    """As Plotly JSON."""
    made = charts.figure([_thinned(panel, POINTS) for panel in drawing.panels])
    made["layout"]["height"] = drawing.height
    if drawing.lines:
        _add_axes(made, drawing)
        _add_bars(made, drawing.bars)
    return made


def parallel(
    measured: Sequence[Measured], space: Space, metric: str, *, maximise: bool
) -> tuple[list[Axis], list[Line]]:
    """An axis for each setting that differs, and the metric's, on which the best is above; the best trial last."""
    ranked = sorted(measured, key=lambda trial: trial.value, reverse=not maximise)  # the best is drawn over the others
    names = dict.fromkeys(name for trial in ranked for name in trial.params)
    varied = [name for name in names if len({repr(trial.params.get(name)) for trial in ranked}) > 1]
    placed = [_placed([trial.params.get(name) for trial in ranked], space.get(name)) for name in varied]
    placed.append(_on_scale([trial.value for trial in ranked], log=False, falling=not maximise))
    axes = [Axis(name, ticks) for name, (_, ticks) in zip([*varied, metric], placed, strict=True)]
    lines = []
    for number, trial in enumerate(ranked):
        share = number / max(1, len(ranked) - 1)
        color = BEST if trial.is_best else f"rgba(72,120,216,{0.38 + 0.5 * share:.2f})"
        heights = [heights[number] for heights, _ in placed]
        lines.append(Line(trial.told, heights, color, 3 if trial.is_best else 1.5))
    return axes, lines


def _panels(curves: Sequence[Curve], *, log: bool, below: bool) -> list[Panel]:
    whole = _CURVES if below else (0.0, 1.0)
    ordered = sorted(curves, key=lambda curve: (curve.is_best, curve.is_running))  # the last is drawn over the others
    held_out = [_trace(curve, curve.held_out) for curve in ordered if curve.held_out]
    training = [_trace(curve, curve.training) for curve in ordered if curve.training]
    last = max((point[0] for trace in (*held_out, *training) for point in trace.points), default=1.0)
    left, right = ((0.0, 0.46), (0.54, 1.0)) if held_out else ((0.0, 0.0), (0.0, 1.0))
    both = [("Held-out loss", "", held_out, left), ("Training loss", "smoothed", training, right)]
    return [
        Panel(name, reading, _positive(traces) if log else traces, place, whole, charts.number, log=log,
              steps=(0.0, max(last, 1.0)), labelled=True)
        for name, reading, traces, place in both
        if traces
    ]  # fmt: skip


def _trace(curve: Curve, points: Sequence[Point]) -> Trace:
    if curve.is_best:
        return Trace(curve.told, points, BEST, "bold")
    return Trace(curve.told, points, RUNNING) if curve.is_running else Trace(curve.told, points, SLATE, "faint")


def _positive(traces: Sequence[Trace]) -> list[Trace]:
    return [Trace(t.name, [point for point in t.points if point[1] > 0], t.color, t.look) for t in traces]


def _thinned(panel: Panel, points: int) -> Panel:
    each = max(24, points // (2 * max(1, len(panel.traces))))
    traces = [Trace(t.name, charts.decimated(t.points, each), t.color, t.look) for t in panel.traces]
    return Panel(**{**panel.__dict__, "traces": traces})


def _placed(
    values: Sequence[Any], wanted: Sequence[Any] | Range | None
) -> tuple[list[float | None], list[tuple[float, str]]]:
    """Where the values of a setting stand on its axis: evenly, if they are few or no numbers, else on a scale."""
    distinct = {repr(value): value for value in values if value is not None}
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct.values())
    if numbers and (isinstance(wanted, Range) or len(distinct) > SHOWN_TICKS):
        known = list(distinct.values())
        spans = min(known) > 0 and max(known) > 50 * min(known)
        return _on_scale(values, log=wanted.log if isinstance(wanted, Range) else spans, falling=False)
    order = list(distinct)
    if numbers:
        order.sort(key=lambda text: distinct[text])
    heights = {text: index / max(1, len(order) - 1) for index, text in enumerate(order)}
    together: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        together.setdefault(repr(value), []).append(index)
    spread = min(SPREAD, 0.3 / max(1, len(order)))
    placed: list[float | None] = [None] * len(values)
    for text, members in together.items():
        for place, index in enumerate(members):
            if values[index] is not None:
                apart = 2 * place / (len(members) - 1) - 1 if len(members) > 1 else 0.0
                placed[index] = heights[text] + spread * apart
    every = -(-len(order) // SHOWN_TICKS)
    return placed, [(heights[text], _short(show(distinct[text]), 14)) for text in order[::every]]


def _on_scale(values: Sequence[Any], *, log: bool, falling: bool) -> tuple[list[float | None], list[tuple[float, str]]]:
    """Where numbers stand on an axis from the least to the greatest, or the other way round."""
    known = [value for value in values if value is not None]
    low, high = min(known), max(known)

    def height(value: float) -> float:
        if low == high:
            return 0.5
        share = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return 1 - share if falling else share

    middle = math.sqrt(low * high) if log else (low + high) / 2
    ticks = list(dict.fromkeys([low, middle, high]))
    digits = next(n for n in range(4, 17) if n == 16 or len({f"{tick:.{n}g}" for tick in ticks}) == len(ticks))
    placed = [None if value is None else height(value) for value in values]
    return placed, [(height(tick), f"{tick:.{digits}g}") for tick in ticks]


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def axis_name(name: str, count: int) -> str:
    """The last part of a setting's name, as long as there is room for beside `count` others."""
    return _short(name.rsplit(".", 1)[-1], max(8, 74 // max(1, count)))


def _axis_labels(drawing: Drawing) -> list[tuple[float, float, str, tuple[str, int], bool]]:
    """What is written at the axes: (axis, height, text, (alignment, pixels aside), whether it is a name)."""
    last = len(drawing.axes) - 1
    labels = []
    for index, axis in enumerate(drawing.axes):
        at = ("left", -8) if index == 0 and last else _MIDDLE
        labels.append((index, 1.0, axis_name(axis.name, last + 1), at, True))
        aside = _RIGHT if index == last else _LEFT
        labels += [(index, height, text, aside, False) for height, text in axis.ticks]
    return labels


def _add_axes(made: dict[str, Any], drawing: Drawing) -> None:
    layout, last = made["layout"], max(1, len(drawing.axes) - 1)
    hidden = {"showgrid": False, "zeroline": False, "showticklabels": False, "fixedrange": True, "ticks": ""}
    layout["xaxis8"] = {"domain": list(_AXES), "anchor": "y8", "range": [0, last], **hidden}
    layout["yaxis8"] = {"domain": list(_BELOW), "anchor": "x8", "range": [-SPREAD, 1 + SPREAD], **hidden}
    layout["shapes"] = [
        {"type": "line", "xref": "x8", "yref": "y8", "x0": index, "x1": index, "y0": -SPREAD, "y1": 1 + SPREAD,
         "line": {"color": SLATE, "width": 1}, "opacity": 0.55, "layer": "below"}
        for index in range(len(drawing.axes))
    ]  # fmt: skip
    layout["annotations"].append(_heading("Settings and metric", "the best in orange", _AXES[0]))
    for index, height, text, (align, aside), is_name in _axis_labels(drawing):
        layout["annotations"].append(
            {"text": f"<b>{escape(text)}</b>" if is_name else escape(text), "xref": "x8", "yref": "y8", "x": index,
             "y": 1 + SPREAD if is_name else height, "xanchor": align, "xshift": aside, "showarrow": False,
             "yanchor": "bottom" if is_name else "middle", "font": {"size": 11, "color": charts.TEXT}}
        )  # fmt: skip
    for line in drawing.lines:
        made["data"].append(
            {"type": "scatter", "mode": "lines+markers", "name": line.told, "x": list(range(len(line.heights))),
             "y": [None if height is None else round(height, 4) for height in line.heights],
             "line": {"color": line.color, "width": line.width}, "marker": {"size": 5, "color": line.color},
             "cliponaxis": False, "connectgaps": True, "xaxis": "x8", "yaxis": "y8",
             "hovertemplate": f"{line.told}<extra></extra>"}
        )  # fmt: skip


def _add_bars(made: dict[str, Any], bars: Sequence[Importance]) -> None:
    layout, rows = made["layout"], max(4, len(bars))
    hidden = {"showgrid": False, "zeroline": False, "showticklabels": False, "fixedrange": True, "ticks": ""}
    layout["xaxis9"] = {"domain": list(_BARS), "anchor": "y9", "range": [0, 1], **hidden}
    layout["yaxis9"] = {"domain": list(_BELOW), "anchor": "x9", "range": [0, rows], **hidden}
    layout["annotations"].append(
        _heading("Importance", "" if bars else f"needs {FEWEST} trials", _BARS[0], MARGIN["l"] - 8)
    )
    for row, bar in enumerate(bars):
        y = rows - row - 0.72
        layout["shapes"].append(
            {"type": "rect", "xref": "x9", "yref": "y9", "x0": 0, "x1": 1, "y0": y - 0.12, "y1": y + 0.12,
             "fillcolor": GRID, "line": {"width": 0}, "layer": "below"}
        )  # fmt: skip
        told = {"xref": "x9", "yref": "y9", "y": y + 0.14, "yanchor": "bottom", "showarrow": False}
        font = {"font": {"size": 11, "color": charts.TEXT}}
        name = escape(_short(bar.name, 24))
        layout["annotations"] += [
            {"text": name, "x": 0, "xanchor": "left", "xshift": -4, **told, **font},
            {"text": f"{bar.share:.0%}", "x": 1, "xanchor": "right", "xshift": 4, **told, **font},
        ]
    if bars:
        made["data"].append(
            {"type": "bar", "orientation": "h", "x": [round(bar.share, 3) for bar in bars], "width": 0.24,
             "y": [rows - row - 0.72 for row in range(len(bars))], "marker": {"color": charts.BLUE},
             "customdata": [escape(bar.name) for bar in bars], "xaxis": "x9", "yaxis": "y9",
             "hovertemplate": "%{customdata} explains %{x:.0%}<extra></extra>"}
        )  # fmt: skip


def _heading(name: str, reading: str, x: float, aside: int = 0) -> dict[str, Any]:
    return {
        "text": f"<b>{name}</b> {reading}", "xref": "paper", "yref": "paper", "x": x, "y": _BELOW[1],
        "xanchor": "left", "yanchor": "bottom", "xshift": -MARGIN["l"] + 8 + aside, "yshift": 26,
        "showarrow": False, "font": {"size": 12.5, "color": charts.TEXT}, "align": "left",
    }  # fmt: skip


def _svg_below(drawing: Drawing) -> str:
    """The settings and their importance in the units of the SVG twin."""
    if not drawing.lines:
        return ""
    width = _svg.WIDTH - MARGIN["l"] - MARGIN["r"]
    height = drawing.height - MARGIN["t"] - MARGIN["b"]
    bottom, top = (MARGIN["t"] + (1 - share) * height for share in _BELOW)
    count = max(1, len(drawing.axes) - 1)

    def x(index: float) -> float:
        return MARGIN["l"] + width * (_AXES[0] + (_AXES[1] - _AXES[0]) * index / count)

    def y(share: float) -> float:
        return bottom - (bottom - top) * (share + SPREAD) / (1 + 2 * SPREAD)

    parts = [
        f'<text x="8" y="{top - 30:.0f}" font-size="12.5"><tspan font-weight="bold">Settings and metric</tspan> '
        "the best in orange</text>"
    ]
    parts += [
        f'<path d="M{x(index):.0f} {top:.0f}V{bottom:.0f}" stroke="{SLATE}" stroke-opacity=".55"/>'
        for index in range(len(drawing.axes))
    ]
    for line in drawing.lines:
        known = [(index, share) for index, share in enumerate(line.heights) if share is not None]
        path = " ".join(f"{x(index):.1f},{y(share):.1f}" for index, share in known)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{line.color}" stroke-width="{line.width}"/>')
    anchors = {"left": "start", "right": "end", "center": "middle"}
    for index, share, text, (align, aside), is_name in _axis_labels(drawing):
        at = top - 6 if is_name else y(share) + 4
        weight = ' font-weight="bold"' if is_name else ""
        parts.append(
            f'<text x="{x(index) + aside:.0f}" y="{at:.0f}" text-anchor="{anchors[align]}"{weight}>'
            f"{escape(text)}</text>"
        )
    return "".join(parts) + _svg_bars(drawing.bars, MARGIN["l"] + width * _BARS[0], width * (1 - _BARS[0]), top)


def _svg_bars(bars: Sequence[Importance], left: float, width: float, top: float) -> str:
    parts = [f'<text x="{left:.0f}" y="{top - 30:.0f}" font-size="12.5" font-weight="bold">Importance</text>']
    for row, bar in enumerate(bars):
        y = top + 12 + 32 * row
        parts.append(
            f'<text x="{left:.0f}" y="{y:.0f}">{escape(_short(bar.name, 24))}</text>'
            f'<text x="{left + width:.0f}" y="{y:.0f}" text-anchor="end">{bar.share:.0%}</text>'
            f'<rect x="{left:.0f}" y="{y + 5:.0f}" width="{width:.0f}" height="8" fill="{SLATE}" fill-opacity=".22"/>'
            f'<rect x="{left:.0f}" y="{y + 5:.0f}" width="{width * bar.share:.0f}" height="8" fill="{charts.BLUE}"/>'
        )
    return "".join(parts)
