"""The charts of a run: a list of events in, a mimebundle out. Pure functions; no widget, no run, no file.

    bundle = charts.bundle(run.events(), View(window=200, log=True))
    display(bundle, raw=True)

A bundle holds the figure for Plotly's renderer, an SVG twin of some KB for nbconvert, GitHub and bare editors, and a
line of text. The figure is a plain dict rather than a `go.Figure` (a test asks go.Figure whether it is valid): the same
JSON, ready in 9 ms instead of the 0.7 s that plotly's classes take to load and to validate it for the first time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nbtune_widgets import _svg

Event = Mapping[str, Any]
Point = tuple[float, float]  # step, value

PLOTLY = "application/vnd.plotly.v1+json"
MAX_POINTS = 500  # of one trace, in the figure
SVG_POINTS = 70  # of one trace, in the twin
SPARK_POINTS, SPARK_DOTS = 40, 8

BLUE, GREEN, ORANGE, SLATE = "#4878d8", "#2f9461", "#d08a1a", "#7f8ea6"
COLORS = (BLUE, ORANGE, GREEN, "#b0569c", "#d9534f", "#3f9fb3", "#8d6bd0", SLATE)  # of runs over each other
TEXT = "#767f8e"  # the greys that reach 4:1 on white and on JupyterLab's black are few; this is one
GRID = "rgba(127,142,166,0.22)"
HEIGHT = 290
MARGIN = {"l": 46, "r": 10, "t": 30, "b": 26}


@dataclass(frozen=True)
class View:
    """What of a run is drawn. The view controls set this; a push applies it."""

    window: int | None = None  # steps; None: the whole run
    log: bool = False
    smoothing: float = 0.8  # weight of the past in the moving average of the loss; 0: none


@dataclass(frozen=True)
class Trace:
    name: str
    points: Sequence[Point]
    color: str
    look: str = "line"  # line | bold | faint | dots | dotted
    unit: str = ""


@dataclass(frozen=True)
class Panel:
    """One chart: a name, the current numbers beside it, and its traces. `x` and `y` are shares of the figure."""

    name: str
    reading: str
    traces: Sequence[Trace]
    x: tuple[float, float]
    y: tuple[float, float]
    tick: Callable[[float], str]
    log: bool = False
    from_zero: bool = False
    steps: tuple[float, float] = field(default=(0.0, 1.0))  # shared range of the horizontal axes
    labelled: bool = False  # whether the steps stand below it although it is not at the bottom

    @property
    def says_steps(self) -> bool:
        return self.labelled or self.y[0] == 0


def bundle(events: Iterable[Event], view: View | None = None) -> dict[str, Any]:
    """The charts of these events as `{mime type: content}`, for `display(..., raw=True)` or `Output.outputs`."""
    return _bundled(panels(events, view or View()))


def _bundled(drawn: Sequence[Panel]) -> dict[str, Any]:
    return {
        PLOTLY: figure(drawn),
        "image/svg+xml": _svg.draw([_thinned(panel, SVG_POINTS) for panel in drawn], HEIGHT, MARGIN, TEXT),
        "text/plain": " | ".join(f"{panel.name} {panel.reading}".strip() for panel in drawn),
    }


def panels(events: Iterable[Event], view: View) -> list[Panel]:
    """Loss, memory, speed, learning rate and gradient norm, with traces of at most MAX_POINTS points."""
    events = list(events)
    train = [event for event in events if event["type"] == "train"]
    evals = series([event for event in events if event["type"] == "eval"], "eval_loss")
    loss = series(train, "loss")
    smooth = smoothed(loss, view.smoothing)
    memory = series(train, "memory_bytes", 1e-9)
    planned = next(
        (e["planned_peak_bytes"] for e in events if e["type"] == "start" and e.get("planned_peak_bytes")), None
    )
    speed, rate, norm = (series(train, key) for key in ("tokens_per_second", "learning_rate", "grad_norm"))

    last = max((point[0] for traced in (loss, evals) for point in traced), default=1.0)
    first = max(0.0, last - view.window) if view.window else 0.0
    steps = (first, max(last, first + 1))

    loss_traces = [Trace("loss", loss, BLUE, "faint"), Trace("smoothed", smooth, BLUE)] if view.smoothing else []
    loss_traces = loss_traces or [Trace("loss", loss, BLUE)]
    ceiling = [(steps[0], planned * 1e-9), (steps[1], planned * 1e-9)] if planned else []
    left, middle, right = (0.0, 0.365), (0.45, 0.71), (0.80, 1.0)
    whole, top, bottom = (0.0, 1.0), (0.61, 1.0), (0.0, 0.39)
    drawn = [
        Panel("Loss", _loss_reading(smooth, train, evals), [*loss_traces, Trace("held out", evals, ORANGE, "dots")],
              left, whole, number, log=view.log),
        Panel("Memory", _memory_reading(memory, planned),
              [Trace("planned", ceiling, SLATE, "dotted", "GB"), Trace("in use", memory, GREEN, unit="GB")],
              middle, top, number, from_zero=True),
        Panel("Tokens/s", f"{speed[-1][1]:,.0f}" if speed else "", [Trace("tokens/s", speed, BLUE)],
              right, top, compact, from_zero=True),
        Panel("Learning rate", f"{rate[-1][1]:.2g}" if rate else "", [Trace("learning rate", rate, SLATE)],
              middle, bottom, scientific, from_zero=True),
        Panel("Gradient norm", number(norm[-1][1]) if norm else "", [Trace("gradient norm", norm, SLATE)],
              right, bottom, number, log=view.log, from_zero=not view.log),
    ]  # fmt: skip
    return [_thinned(_windowed(panel, steps), MAX_POINTS) for panel in drawn]


def overlay(curves: Sequence[tuple[str, Sequence[Event]]], view: View | None = None) -> dict[str, Any]:
    """The losses of several runs, given as (name, events), over each other; the colours are those of `COLORS`."""
    view = view or View()
    training, held_out = [], []
    for index, (name, events) in enumerate(curves):
        color = COLORS[index % len(COLORS)]
        loss = series([event for event in events if event["type"] == "train"], "loss")
        evals = series([event for event in events if event["type"] == "eval"], "eval_loss")
        training.append(Trace(name, smoothed(loss, view.smoothing), color))
        held_out.append(Trace(name, evals, color))
    last = max((point[0] for trace in (*training, *held_out) for point in trace.points), default=1.0)
    whole = (0.0, 1.0)
    drawn = [
        Panel("Loss", "smoothed" if view.smoothing else "", training, (0.0, 0.46), whole, number, log=view.log),
        Panel("Held-out loss", "", held_out, (0.54, 1.0), whole, number, log=view.log),
    ]
    return _bundled([_thinned(_windowed(panel, (0.0, max(last, 1.0))), MAX_POINTS) for panel in drawn])


def spark(events: Sequence[Event]) -> str:
    """The smoothed loss and the held-out loss as a small SVG picture."""
    loss = series([event for event in events if event["type"] == "train"], "loss")
    evals = series([event for event in events if event["type"] == "eval"], "eval_loss")
    smooth = decimated(smoothed(loss, View.smoothing), SPARK_POINTS)
    return _svg.sparkline(smooth, decimated(evals, SPARK_DOTS), (BLUE, ORANGE))


def figure(drawn: Sequence[Panel]) -> dict[str, Any]:
    """The panels as Plotly JSON: transparent, few gridlines, sizes that hold from 700 px upwards."""
    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = {
        "height": HEIGHT,
        "autosize": True,
        "margin": MARGIN,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 11, "color": TEXT},
        "showlegend": False,
        "hovermode": "closest",
        "hoverlabel": {"font": {"size": 11}},
        "annotations": [],
    }
    for index, panel in enumerate(drawn, start=1):
        suffix = "" if index == 1 else str(index)
        data += [_plotly_trace(trace, suffix) for trace in panel.traces if trace.points]
        layout[f"xaxis{suffix}"] = _axis(domain=panel.x, anchor=f"y{suffix}", range=list(panel.steps), showgrid=False,
                                         nticks=6, ticklabelstandoff=4, showticklabels=panel.says_steps)  # fmt: skip
        if panel.steps[1] - panel.steps[0] <= 6:
            layout[f"xaxis{suffix}"]["dtick"] = 1  # there is no step 1.5
        layout[f"yaxis{suffix}"] = _axis(domain=panel.y, anchor=f"x{suffix}", gridcolor=GRID, **_vertical(panel))
        layout["annotations"].append(
            {
                "text": f"<b>{panel.name}</b> {panel.reading}",
                "xref": "paper", "yref": "paper", "x": panel.x[0], "y": panel.y[1],
                "xanchor": "left", "yanchor": "bottom", "xshift": -MARGIN["l"] + 8, "yshift": 7,
                "showarrow": False, "font": {"size": 12.5, "color": TEXT}, "align": "left",
            }
        )  # fmt: skip
    # Plotly 7 puts a "share chart" button, which uploads, on the bar; charts of a private run have no use for it.
    return {"data": data, "layout": layout, "config": {"displayModeBar": False, "responsive": True}}


def decimated(points: Sequence[Point], limit: int) -> list[Point]:
    """At most `limit` points that keep the first, the last, and the lowest and highest of every stretch between."""
    if len(points) <= limit:
        return list(points)
    inner = points[1:-1]
    buckets = (limit - 2) // 2
    kept = [points[0]]
    for index in range(buckets):
        bucket = inner[index * len(inner) // buckets : (index + 1) * len(inner) // buckets]
        ends = {min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])}
        kept += sorted(ends)
    return [*kept, points[-1]]


def number(value: float) -> str:
    """Three significant digits, the way a person writes them: 2.41, 0.00018, 1,530, 4e-06."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.2g}"
    return f"{value:.2f}" if 1 <= abs(value) < 10 else f"{value:.3g}"


def compact(value: float) -> str:
    """A tick label: 800, 1.2k, 35k."""
    return f"{value / 1000:.3g}k" if value >= 1000 else f"{value:.3g}"


def scientific(value: float) -> str:
    """A tick label for small numbers: 2e-4."""
    return f"{value:.0e}".replace("e-0", "e-") if 0 < value < 0.01 else number(value)


def series(events: Sequence[Event], key: str, scale: float = 1.0) -> list[Point]:
    """The finite values of `key` by step; a step without a number (a loss of NaN, a null) leaves a gap in the list."""
    points = ((event["step"], event.get(key)) for event in events)
    return [(step, value * scale) for step, value in points if value is not None and math.isfinite(value)]


def smoothed(points: Sequence[Point], smoothing: float) -> list[Point]:
    """Exponential moving average, divided by the weight it has seen so that the first steps are not drawn to zero."""
    average = weight = 0.0
    smooth = []
    for step, value in points:
        average = smoothing * average + (1 - smoothing) * value
        weight = smoothing * weight + (1 - smoothing)
        smooth.append((step, average / weight))
    return smooth


def _loss_reading(smooth: Sequence[Point], train: Sequence[Event], evals: Sequence[Point]) -> str:
    parts = []
    latest = train[-1]["loss"] if train else None
    if latest is not None and not math.isfinite(latest):
        parts.append(f"{latest} at step {train[-1]['step']}")
    elif smooth:
        parts.append(f"{smooth[-1][1]:.2f}")
    if evals:
        before = f" (was {evals[0][1]:.2f})" if len(evals) > 1 else ""
        parts.append(f"held out {evals[-1][1]:.2f}{before}")
    return " · ".join(parts)


def _memory_reading(memory: Sequence[Point], planned: float | None) -> str:
    parts = [f"{memory[-1][1]:.2f} GB"] if memory else []
    if planned:
        parts.append(f"planned {planned * 1e-9:.2f}")
    return " · ".join(parts)


def _windowed(panel: Panel, steps: tuple[float, float]) -> Panel:
    traces = [_replaced(trace, [point for point in trace.points if point[0] >= steps[0]]) for trace in panel.traces]
    if panel.log:  # zero has no logarithm: a warm-up's gradient of exactly 0 would end the axis
        traces = [_replaced(trace, [point for point in trace.points if point[1] > 0]) for trace in traces]
    return Panel(**{**panel.__dict__, "traces": traces, "steps": steps})


def _thinned(panel: Panel, limit: int) -> Panel:
    return Panel(**{**panel.__dict__, "traces": [_replaced(t, decimated(t.points, limit)) for t in panel.traces]})


def _replaced(trace: Trace, points: Sequence[Point]) -> Trace:
    return Trace(**{**trace.__dict__, "points": points})


def _plotly_trace(trace: Trace, axis: str) -> dict[str, Any]:
    line: dict[str, Any] = {"color": trace.color, "width": 1.8}
    drawn: dict[str, Any] = {"type": "scatter", "mode": "lines", "name": trace.name, "line": line}
    if trace.look == "faint":
        line["width"] = 1
        drawn["opacity"] = 0.42
    elif trace.look == "bold":
        line["width"] = 3
    elif trace.look == "dotted":
        line |= {"dash": "dot", "width": 1.4}
    elif trace.look == "dots":
        drawn |= {"mode": "markers", "marker": {"color": trace.color, "size": 7}, "cliponaxis": False}
        del drawn["line"]
    if len(trace.points) == 1 and trace.look != "dots":  # one point makes no line
        drawn |= {"mode": "markers", "marker": {"color": trace.color, "size": 4}}
    drawn["x"] = [point[0] for point in trace.points]
    drawn["y"] = [float(f"{point[1]:.5g}") for point in trace.points]  # five digits draw the same and weigh a third
    unit = f" {trace.unit}" if trace.unit else ""
    drawn["hovertemplate"] = f"{trace.name} %{{y:.4~g}}{unit}<br>step %{{x}}<extra></extra>"
    return drawn | {"xaxis": f"x{axis}", "yaxis": f"y{axis}"}


def _axis(**settings: Any) -> dict[str, Any]:
    return {"zeroline": False, "showline": False, "ticks": "", "automargin": False, "fixedrange": False, **settings}


def _vertical(panel: Panel) -> dict[str, Any]:
    settings: dict[str, Any] = {"nticks": 5 if panel.y[1] - panel.y[0] > 0.4 else 3}
    values = [point[1] for trace in panel.traces for point in trace.points] or [1.0]
    if panel.log:
        settings["type"] = "log"
        if max(values) < 10 * min(values):  # within a decade Plotly labels next to nothing
            settings["tickvals"] = nice_ticks(min(values), max(values), settings["nticks"])
        return settings
    if panel.from_zero:
        settings["range"] = [0, (max(values) or 1.0) * 1.12]
    if panel.tick is scientific:
        settings["tickvals"] = nice_ticks(0, max(values), 2)
        settings["ticktext"] = [scientific(value) for value in settings["tickvals"]]
    if panel.tick is compact:
        settings["tickformat"] = "~s"
    return settings


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2, 5 times a power of ten) from `low` to `high`."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= rough)
    return [float(f"{index * step:.12g}") for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
