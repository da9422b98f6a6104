"""The Plotly page of a benchmark: seconds, loss and memory of all sides, and the figures as a table."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

COLOURS = ("#2f6feb", "#d9480f", "#868e96", "#2b8a3e")


def page(figures: Mapping[str, Any]) -> str:
    """A self-contained HTML page of `finish`'s object."""
    title = f"{figures['benchmark']}: {figures['speed_ratio']:.2f}x as fast, {figures['memory_ratio']:.2f}x the memory"
    chart = _chart(figures).to_html(full_html=False, include_plotlyjs=True)
    details = html.escape(json.dumps({key: figures[key] for key in ("settings", "versions", "machine")}, indent=1))
    head = f"<title>nbtune {html.escape(title)}</title><style>{_STYLE}</style>"
    body = f"<h1>{html.escape(title)}</h1><p>{figures['date']}</p>{chart}{_table(figures)}<pre>{details}</pre>"
    return f'<!doctype html><html lang="en"><meta charset="utf-8">{head}<body>{body}</body></html>\n'


def _sides(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [figures["ours"], figures["theirs"], *figures["others"]]


def _chart(figures: Mapping[str, Any]) -> go.Figure:
    sides = _sides(figures)
    names = ["Seconds a round", "Memory, GB", "Loss"] if "loss" in sides[0] else ["Seconds a round", "Memory, GB"]
    figure = make_subplots(rows=1, cols=len(names), subplot_titles=names)
    for side, colour in zip(sides, COLOURS, strict=False):
        look = {"name": side["name"], "legendgroup": side["name"], "marker_color": colour}
        figure.add_trace(go.Box(y=side["all_seconds"], boxpoints="all", **look), row=1, col=1)
        held = [side["loaded_bytes"] / 1e9, side["above_loaded_bytes"] / 1e9]
        figure.add_trace(go.Bar(x=["loaded", "above"], y=held, showlegend=False, **look), row=1, col=2)
        if "loss" in side:
            figure.add_trace(go.Scatter(y=side["loss"], mode="lines+markers", showlegend=False, **look), row=1, col=3)
    figure.update_yaxes(rangemode="tozero", row=1, col=1)
    figure.update_layout(template="plotly_white", height=420, margin={"t": 60, "b": 40}, barmode="group")
    return figure


def _table(figures: Mapping[str, Any]) -> str:
    rows = []
    for side in _sides(figures):
        ratios = figures["against"].get(side["name"])
        cells = [
            side["name"],
            f"{side['seconds']:.4g}",
            f"{side['tokens_per_second']:.0f}" if "tokens_per_second" in side else "",
            f"{side['peak_bytes'] / 1e9:.2f}",
            f"{side['above_loaded_bytes'] / 1e9:.2f}",
            f"{side['mfu']:.0%}" if "mfu" in side else "",
            f"{ratios['speed_ratio']:.2f}x" if ratios else "",
            f"{ratios['memory_ratio']:.2f}x" if ratios else "",
        ]
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    heads = ("", "s / round", "tokens/s", "peak GB", "above loaded GB", "MFU", "ours is faster", "our memory")
    return f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{''.join(rows)}</table>"


_STYLE = """
body { font: 15px system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; color: #212529 }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .9rem; border-bottom: 1px solid #dee2e6; text-align: right }
td:first-child { text-align: left; font-weight: 600 }
pre { background: #f8f9fa; padding: 1rem; overflow: auto }
"""
