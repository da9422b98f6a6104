"""What a run has to say besides its charts: the answers it gave on the way, and why it failed.

Pieces of HTML whose styles are inline, since they stay in saved notebooks, which have no style block of ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbtune_widgets.live import LiveRun

Event = Mapping[str, Any]

SHOWN_EVALUATIONS = 6  # of one question: the first, the last, and some between
_SOFT = "opacity:.62"
_LINE = "1px solid rgba(127,142,166,.28)"
_MONO = "font:12px/1.5 var(--jp-code-font-family,ui-monospace,monospace)"


def samples(events: Iterable[Event]) -> str:
    """For each question the answers by step, and the data's own answer under them."""
    blocks = [_question(prompt, answers, reference) for prompt, (answers, reference) in _by_question(events).items()]
    return "".join(blocks)


def count_samples(events: Iterable[Event]) -> int:
    """How many questions were answered."""
    return len(_by_question(events))


def failure(run: LiveRun) -> str:
    """Title, what happened and what to do, what is kept, and the traceback folded; "" where the run did not fail."""
    text = run.error
    if not text:
        return ""
    title, *rest = text.strip().splitlines() or [text]
    lines = "".join(f"<div>{escape(line)}</div>" for line in rest if line.strip())
    edge = "border-left:3px solid #d9534f;border-radius:4px;background:rgba(217,83,79,.10)"
    return (
        f'<div role="alert" style="{edge};padding:7px 12px;margin:3px 0;overflow-wrap:anywhere">'
        f'<b style="font-weight:600">{escape(title)}</b>{lines}'
        f'<div style="{_SOFT};margin-top:3px">{escape(kept(run))}</div>{folded("Traceback", run.traceback or "")}</div>'
    )


def kept(run: LiveRun) -> str:
    """What a resume starts from."""
    if run.kept_step is None:
        return "No checkpoint was written yet: Resume starts from the beginning."
    return f"The checkpoint of step {run.kept_step} is kept: Resume goes on from it."


def folded(title: str, text: str) -> str:
    """A text behind its title; one click into it selects all of it, to be copied."""
    if not text:
        return ""
    box = f"{_MONO};white-space:pre-wrap;overflow-wrap:anywhere;max-height:280px;overflow:auto;user-select:all"
    return (
        f'<details style="margin-top:4px"><summary style="cursor:pointer">{escape(title)}</summary>'
        f'<pre title="One click selects all of it" style="{box};margin:4px 0;padding:8px 10px;border:{_LINE};'
        f'border-radius:6px;background:none;color:inherit">{escape(text.strip())}</pre></details>'
    )


def _by_question(events: Iterable[Event]) -> dict[str, tuple[list[tuple[int, str]], str]]:
    """By question: ([(step, answer), ...], the data's answer)."""
    found: dict[str, tuple[list[tuple[int, str]], str]] = {}
    for event in events:
        if event["type"] == "samples":
            for sample in event["samples"]:
                answers, _ = found.setdefault(sample["prompt"], ([], sample["reference"]))
                answers.append((event["step"], sample["answer"]))
    return found


def _question(prompt: str, answers: Sequence[tuple[int, str]], reference: str) -> str:
    rows = [_row(f"step {step}", answer) for step, answer in _some(answers)]
    if reference:
        rows.append(_row("data", reference, "background:rgba(47,148,97,.13);border-radius:4px"))
    return (
        f'<div style="border-top:{_LINE};padding:8px 0 6px;font-size:13px">'
        f'<div style="font-weight:600;white-space:pre-wrap;overflow-wrap:anywhere;margin-bottom:3px">{escape(prompt)}'
        f"</div>{''.join(rows)}</div>"
    )


def _row(name: str, text: str, look: str = "") -> str:
    return (
        f'<div style="display:flex;gap:12px;padding:2px 8px;{look}">'
        f'<span style="flex:0 0 64px;{_SOFT};font-size:12px;line-height:1.6;text-align:right">{escape(name)}</span>'
        f'<span style="flex:1 1 0;min-width:0;white-space:pre-wrap;overflow-wrap:anywhere">{escape(text) or "&nbsp;"}'
        "</span></div>"
    )


def _some(answers: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """At most SHOWN_EVALUATIONS, evenly spread, the first and the last among them."""
    if len(answers) <= SHOWN_EVALUATIONS:
        return list(answers)
    last = SHOWN_EVALUATIONS - 1
    return [answers[round(index * (len(answers) - 1) / last)] for index in range(SHOWN_EVALUATIONS)]
