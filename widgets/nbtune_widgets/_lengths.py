"""How long the examples are, as a histogram in HTML with the line after which they are cut."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BARS = 36
_STEPS = (1, 2, 5)


def histogram(lengths: npt.NDArray[np.int32], max_length: int) -> str:
    """Bars that fill the width they are given; examples beyond the last edge are counted in the last bar.

    Args:
        lengths: Of the examples, in tokens; at least one.
        max_length: Where they are cut.
    """
    edges = _edges(lengths, max_length)
    counts, _ = np.histogram(np.clip(lengths, edges[0], edges[-1]), edges)
    beyond = int(lengths.max()) > edges[-1]
    bars = "".join(
        _bar(int(low), None if beyond and last else int(high), int(count), int(counts.max()), max_length)
        for low, high, count, last in zip(
            edges[:-1], edges[1:], counts, [False] * (len(counts) - 1) + [True], strict=True
        )
    )
    half = f"half up to {np.median(lengths):,.0f}"
    told = (
        f"{len(lengths):,} example{'s' if len(lengths) > 1 else ''} of {lengths.min():,} to {lengths.max():,} tokens, "
        f"{half}; cut at {max_length:,}"
    )
    last = ("… " if beyond else "") + f"{lengths.max():,}"
    return (
        f'<div class="nt-lengths" role="img" aria-label="{told}" title="{told}"><div class="nt-bars">{bars}'
        f"{_line(edges, max_length)}</div>"
        f'<div class="nt-axis"><span>{lengths.min():,}</span><span>{half}</span><span>{last}</span></div></div>'
    )


def longer_than(lengths: npt.NDArray[np.int32], max_length: int) -> int:
    """The power of two that holds the longest example, at least `max_length`."""
    return max(max_length, 1 << (int(lengths.max()) - 1).bit_length())


def _edges(lengths: npt.NDArray[np.int32], max_length: int) -> npt.NDArray[np.int64]:
    """Borders of the bars, round numbers. A few very long examples do not press all others into one bar."""
    low, most = int(lengths.min()), int(lengths.max())
    high = max(int(1.3 * np.percentile(lengths, 99)), int(1.25 * max_length) if most > max_length else 0)
    high = most if most <= 1.3 * high else high
    width = _round_up((high - low + 1) / BARS)
    first = low // width * width
    bars = -(-(high + 1 - first) // width)
    return first + width * np.arange(bars + 1, dtype=np.int64)


def _round_up(value: float) -> int:
    """The next of 1, 2, 5, 10, 20, ..."""
    power = 1
    while True:
        for step in _STEPS:
            if step * power >= value:
                return step * power
        power *= 10


def _bar(low: int, high: int | None, count: int, most: int, max_length: int) -> str:
    # A bar that holds anything is seen: one long row among thousands is what one looks for.
    height = max(2.5, 100 * count / most) if count else 0
    look = ' class="nt-over"' if low >= max_length else ""
    span = f"{low:,} or more" if high is None else f"{low:,} to {high - 1:,}"
    return f'<i{look} style="height:{height:.1f}%" title="{span} tokens: {count:,}"></i>'


def _line(edges: npt.NDArray[np.int64], max_length: int) -> str:
    place = (max_length - edges[0]) / (edges[-1] - edges[0])
    if not 0 <= place <= 1:
        return ""
    side = "nt-left" if place > 0.8 else ""
    return f'<b class="nt-limit {side}" style="left:{100 * place:.2f}%"><em>{max_length:,}</em></b>'
