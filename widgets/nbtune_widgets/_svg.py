"""The SVG twin of the charts: what is seen where there is no Plotly renderer (nbconvert, GitHub, bare editors)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from nbtune_widgets.charts import Panel, Trace

WIDTH = 900
SPARK_WIDTH, SPARK_HEIGHT = 94, 28
GRID = "#7f8ea6"


def draw(panels: Sequence[Panel], height: int, margin: Mapping[str, int], text_color: str, *, beside: str = "") -> str:
    """One picture of all panels, WIDTH x `height` units, that scales to the width it is given.

    `beside` is what else is drawn, in the same units.
    """
    label = "; ".join(f"{panel.name} {panel.reading}".strip() for panel in panels)
    body = "".join(_panel(panel, height, margin) for panel in panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="100%" role="img" '
        f'style="max-width:{WIDTH}px" font-family="system-ui,sans-serif" font-size="11" fill="{text_color}">'
        f"<title>{escape(label)}</title>{body}{beside}</svg>"
    )


def sparkline(
    points: Sequence[tuple[float, float]], dots: Sequence[tuple[float, float]], colors: tuple[str, str]
) -> str:
    """A curve of SPARK_WIDTH x SPARK_HEIGHT pixels without axes, and dots on it; "" where there are no points."""
    both = [*points, *dots]
    if not both:
        return ""
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*both, strict=True))

    def at(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - left) / ((right - left) or 1)
        up = (point[1] - low) / ((high - low) or 1)
        return 3 + across * (SPARK_WIDTH - 6), SPARK_HEIGHT - 3 - up * (SPARK_HEIGHT - 6)

    curve = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, points))
    marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{colors[1]}"/>' for x, y in map(at, dots))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{SPARK_WIDTH}" height="{SPARK_HEIGHT}" aria-hidden="true" '
        f'style="display:block"><polyline points="{curve}" fill="none" stroke="{colors[0]}" stroke-width="1.6" '
        f'stroke-linejoin="round"/>{marks}</svg>'
    )


def _panel(panel: Panel, height: int, margin: Mapping[str, int]) -> str:
    inner_width, inner_height = WIDTH - margin["l"] - margin["r"], height - margin["t"] - margin["b"]
    left, right = (margin["l"] + share * inner_width for share in panel.x)
    top, bottom = (margin["t"] + (1 - share) * inner_height for share in reversed(panel.y))
    low, high = _range(panel)

    def x(step: float) -> float:
        return left + (step - panel.steps[0]) / (panel.steps[1] - panel.steps[0]) * (right - left)

    def y(value: float) -> float:
        value, floor, ceiling = (math.log10(v) for v in (value, low, high)) if panel.log else (value, low, high)
        return bottom - (value - floor) / (ceiling - floor) * (bottom - top)

    parts = [
        f'<text x="{left - margin["l"] + 8:.0f}" y="{top - 10:.0f}" font-size="12.5">'
        f'<tspan font-weight="bold">{escape(panel.name)}</tspan> {escape(panel.reading)}</text>'
    ]
    for share in (0, 0.5, 1):
        value = 10 ** (math.log10(low) + share * math.log10(high / low)) if panel.log else low + share * (high - low)
        height_of = y(value)
        parts.append(
            f'<path d="M{left:.0f} {height_of:.1f}H{right:.0f}" stroke="{GRID}" stroke-opacity=".25"/>'
            f'<text x="{left - 5:.0f}" y="{height_of + 4:.1f}" text-anchor="end">{escape(panel.tick(value))}</text>'
        )
    if panel.says_steps:
        parts += [
            f'<text x="{left:.0f}" y="{bottom + 15:.0f}">{panel.steps[0]:.0f}</text>',
            f'<text x="{right:.0f}" y="{bottom + 15:.0f}" text-anchor="end">step {panel.steps[1]:.0f}</text>',
        ]
    for trace in panel.traces:
        parts.append(_trace(trace, [(x(step), y(value)) for step, value in trace.points]))
    return "".join(parts)


def _trace(trace: Trace, points: Sequence[tuple[float, float]]) -> str:
    if not points:
        return ""
    if trace.look == "dots" or len(points) == 1:
        return "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{trace.color}"/>' for x, y in points)
    extra = {"faint": ' stroke-opacity=".42"', "dotted": ' stroke-dasharray="2 4"'}.get(trace.look, "")
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    width = {"faint": 1, "bold": 3}.get(trace.look, 1.8)
    return f'<polyline points="{path}" fill="none" stroke="{trace.color}" stroke-width="{width}"{extra}/>'


def _range(panel: Panel) -> tuple[float, float]:
    """Lowest and highest value of the vertical axis; never equal, and above zero on a logarithmic one."""
    values = [value for trace in panel.traces for _, value in trace.points] or [1.0]
    low, high = min(values), max(values)
    if panel.log:
        return (low, high) if high > low else (low / 2, high * 2)
    low = 0.0 if panel.from_zero else low
    return (low, high + 0.08 * (high - low)) if high > low else (low - 0.5, high + 0.5)
