"""What stays in the notebook when a run has ended: plain HTML that shows without a kernel and without widget state."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from nbtune.spec import RunSpec, method_label
from nbtune_widgets import _reports
from nbtune_widgets._style import gigabytes

if TYPE_CHECKING:
    from nbtune_widgets.live import LiveRun

_CELL = "padding:3px 14px 3px 0;text-align:left;vertical-align:top;border:0;background:none"


def title(spec: RunSpec) -> str:
    """LoRA r16 · smollm2-135m-instruct · stdlib-docs; of a path only its last part."""
    method = "Full" if spec.method == "full" else method_label(spec.method.to_dict())
    model, data = (text.rstrip("/").rsplit("/", 1)[-1] for text in (spec.model.name, spec.data.source))
    return f"{method} · {model} · {data}"


def rows(run: LiveRun) -> list[tuple[str, str]]:
    """The run in a few lines: (what, how much)."""
    summary = run.summary()
    found = [
        ("Run", f"{run.id}, {run.status}" if run.id.endswith(run.name) else f"{run.name} ({run.id}), {run.status}"),
        ("Setting", title(run.spec)),
        ("Held-out loss", change(summary)),
        ("Speed", _if(summary.get("train_tokens_per_second"), lambda value: f"{value:,.0f} tokens/s")),
        ("Peak memory", _memory(summary)),
        ("Trainable", _if(summary.get("trainable_parameters"), lambda value: f"{value:,} parameters")),
        ("Folder", str(run.path)),
        ("Failed with", run.error or ""),
        ("Kept", _reports.kept(run) if run.error else ""),
    ]
    return [(what, text) for what, text in found if text]


def bundle(run: LiveRun) -> dict[str, str]:
    """The table as a mimebundle. Styles are inline: a saved notebook has no style block of ours."""
    table = rows(run)
    body = "".join(
        f'<tr style="background:none"><th style="{_CELL};font-weight:600">{escape(what)}</th>'
        f'<td style="{_CELL};white-space:pre-line">{escape(text)}</td></tr>'
        for what, text in table
    )
    look = "border:0;border-collapse:collapse;font-size:13px;margin:4px 0 0 6px"
    html = f'<table style="{look}"><tbody>{body}</tbody></table>{_details(run)}'
    return {"text/html": html, "text/plain": "\n".join(f"{what}: {text}" for what, text in table)}


def _details(run: LiveRun) -> str:
    """What is kept behind a title: the answers on the way, the traceback of a failure, the spec."""
    answers = _reports.samples(run.events())
    folded = f"<details><summary>What it answered</summary>{answers}</details>" if answers else ""
    folded += _reports.folded("Traceback", run.traceback or "") + _reports.folded("Spec", run.spec.to_yaml())
    return f'<div style="margin:6px 0 0 6px;font-size:13px">{folded}</div>'


def change(summary: Mapping[str, Any]) -> str:
    """The held-out loss before and after: 3.730 → 2.412 (−35%)."""
    before, after = summary.get("eval_loss_before"), summary.get("eval_loss_after")
    if before is None or after is None or before == after:  # measured once
        return _if(after if after is not None else before, lambda value: f"{value:.3f}")
    return (
        f"{before:.3f} → {after:.3f} ({(after - before) / before:+.0%})".replace("-", "−")
        if before
        else f"{before:.3f} → {after:.3f}"
    )


def _memory(summary: Mapping[str, Any]) -> str:
    measured, planned = summary.get("measured_peak_bytes"), summary.get("planned_peak_bytes")
    parts = [_if(measured, gigabytes), _if(planned, lambda value: f"planned {gigabytes(value)}")]
    return ", ".join(part for part in parts if part)


def _if(value: Any, text: Any) -> str:
    return "" if value is None else text(value)
