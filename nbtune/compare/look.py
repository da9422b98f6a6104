"""How the arena looks: the theme, the style sheet, and the small pieces of HTML that are not Gradio components."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.themes.utils import colors, sizes

from nbtune.compare.conversation import Turn, View
from nbtune.errors import NbtuneError
from nbtune.infer.attachments import Context

if TYPE_CHECKING:
    from nbtune.infer.engine import Finish, Stats

CSS = Path(__file__).with_name("page.css")
TOGGLE_DARK = "() => { document.body.classList.toggle('dark') }"
FINISHED: dict[Finish, str] = {
    "end_of_turn": "",
    "max_new_tokens": "cut at the limit",
    "context": "context full",
    "stopped": "stopped",
}
BLUE = colors.Color(
    *("#eef3fd", "#dbe6fb", "#bcd0f7", "#94b3f0", "#6b93e6", "#3b6fd4"),
    *("#2f5fc0", "#274f9f", "#22427f", "#1d3663", "#14243f"),
)
_TIME = "Written together with the other columns: their seconds are the same."


def theme() -> gr.themes.Base:
    """The look of the other nbtune views: grey ground, white cards, one blue; the system's fonts, nothing fetched."""
    fills = {
        "body_background_fill": ("#eef0f4", "#0f131a"),
        "block_background_fill": ("#ffffff", "#171c25"),
        "background_fill_primary": ("#ffffff", "#171c25"),
        "border_color_primary": ("#dfe3ea", "#2a3240"),
        "button_primary_background_fill": ("*primary_500", "*primary_500"),
        "button_primary_background_fill_hover": ("*primary_600", "*primary_600"),
        "button_secondary_background_fill": ("#ffffff", "#1d2430"),
        "input_background_fill": ("#ffffff", "#1d2430"),
        "input_border_color": ("#dfe3ea", "#2a3240"),
        "input_border_width": ("1px", "1px"),
    }
    values = {name: light for name, (light, _) in fills.items()}
    values |= {f"{name}_dark": dark for name, (_, dark) in fills.items()}
    base = gr.themes.Base(
        primary_hue=BLUE,
        neutral_hue=colors.slate,
        text_size=sizes.text_md,
        radius_size=sizes.radius_md,
        font=("Inter", "ui-sans-serif", "system-ui", "sans-serif"),
        font_mono=("ui-monospace", "SFMono-Regular", "Menlo", "monospace"),
    )
    return base.set(**values)


def head(name: str, label: str, turn: Turn | None = None, column: str | None = None) -> str:
    """The line above a column: its name, what it is, and what its answer in this turn cost.

    column: its own name, where the name that is shown is another.
    """
    column = column or name
    live, stats = "", ""
    if turn is not None and column in turn.answers:
        finished = turn.finished.get(column)
        live = "" if finished else "<i class='nb-live'></i>"
        note = f" · <em>{FINISHED[finished]}</em>" if finished and FINISHED[finished] else ""
        stats = f"<span class='nb-stats' title='{_TIME}'>{_stats(turn.stats.get(column))}{note}</span>"
    title = f"<b>{html.escape(name)}</b><span class='nb-label'>{html.escape(label)}</span>"
    return f"<div class='nb-head'>{title}{live}{stats}</div>"


def place(position: int, count: int) -> str:
    """What a column is called while nobody may know which it is."""
    words = {2: ("Left", "Right"), 3: ("Left", "Middle", "Right")}
    return words[count][position] if count in words else f"Column {position + 1}"


def revealed(columns: Sequence[str]) -> str:
    """Who was who."""
    pairs = (f"{place(position, len(columns))} was <b>{html.escape(name)}</b>" for position, name in enumerate(columns))
    text = ", ".join(pairs)
    return f"<div class='nb-told'>Thank you. {text}. The next question begins a new round.</div>"


def attached(context: Context) -> str:
    """What of each file will be read, within the budget."""
    files = len(context.shares)
    text = f"{files} file{'s' if files > 1 else ''}, {context.tokens:,} of {context.budget:,} tokens"
    shares = "".join(
        f"<span class='nb-chip{' nb-cut' if share.cut else ''}'>{html.escape(share.text)}</span>"
        for share in context.shares
    )
    return f"<div class='nb-files'><b>{text}</b>{shares}</div>"


def told(text: str, more: str = "") -> str:
    """Something that went well."""
    return f"<div class='nb-told'>{html.escape(text)} <span class='nb-label'>{html.escape(more)}</span></div>"


def moment(text: str) -> str:
    """What a person waits for."""
    return f"<div class='nb-moment'>{html.escape(text)}</div>"


def total(view: View) -> str:
    """Speed of all columns together, as the person who waits sees it."""
    if not view.stats:
        return ""
    speed = f"{view.tokens_per_second:.0f} tokens/s, {view.seconds:.1f} s"
    return f"<div class='nb-total'>{count(len(view.answers))} together: {speed}</div>"


def problem(error: NbtuneError) -> str:
    parts = " ".join(html.escape(part) for part in (error.message, error.remedy) if part)
    return f"<div class='nb-notice'><b>{html.escape(error.title)}.</b> {parts}</div>"


def chip(text: str) -> str:
    return f"<span class='nb-chip'>{html.escape(text)}</span>"


def count(columns: int) -> str:
    return "one column" if columns == 1 else f"{columns} columns"


def dtype_name(dtype: Any) -> str:
    """`bf16` for torch.bfloat16."""
    name = str(dtype).removeprefix("torch.")
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(name, name)


def _stats(stats: Stats | None) -> str:
    if stats is None or not stats.tokens:
        return "reading the prompt"
    first = stats.first_token_seconds
    parts = [f"{first * 1000:.0f} ms to first token" if first < 1 else f"{first:.1f} s to first token"]
    if stats.tokens_per_second:
        parts.append(f"{stats.tokens_per_second:.0f} tokens/s")
    parts.append(f"{stats.tokens} tokens")
    return " · ".join(f"<span>{part}</span>" for part in parts)
