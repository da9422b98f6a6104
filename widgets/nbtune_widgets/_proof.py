"""The proof of an export as a card: how near it is to the model in memory, where it is, how to load it."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from nbtune_widgets._cards import size
from nbtune_widgets._style import chip

if TYPE_CHECKING:
    from nbtune.export import Export, Proof

TITLES = {"adapter": "Adapter", "merged": "Merged model", "gguf": "GGUF", "gguf-lora": "GGUF adapter"}
CSS = """
.nbtune .nt-proof{border:1px solid var(--nt-line);border-left:3px solid var(--nt-green);border-radius:8px;
 padding:12px 16px;margin:10px 2px 2px}
.nbtune .nt-tick{display:inline-flex;align-items:center;justify-content:center;width:18px;height:18px;border-radius:9px;
 background:var(--nt-green);color:#fff;font-size:11px;font-weight:700}
.nbtune .nt-figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(164px,1fr));gap:10px;margin:12px 0}
.nbtune .nt-figures>div{background:var(--nt-wash);border-radius:8px;padding:8px 12px 9px}
.nbtune .nt-figures b{display:block;font-size:20px;line-height:1.3;font-weight:600;color:var(--nt-ink);
 font-variant-numeric:tabular-nums}
.nbtune .nt-figures .nt-gauge{margin:6px 0 1px;background:var(--nt-line)}
.nbtune .nt-figures .nt-gauge div{background:var(--nt-green)}
.nbtune .nt-place{font:12px/1.5 var(--jp-code-font-family,ui-monospace,monospace);overflow-wrap:anywhere;
 color:var(--nt-ink);user-select:all}
.nbtune .nt-proof pre{user-select:all}
.nbtune .nt-proof a{color:var(--nt-blue);text-decoration:underline}
"""


def proof(done: Export) -> str:
    """What was written, how near it is to the model in memory, where it is and how to load it, as HTML."""
    found = done.proof
    figures = [
        _figure(
            f"{found.greedy_agree} of {found.greedy_tokens}",
            "greedy tokens the same",
            found.greedy_agree / found.greedy_tokens,
        ),
        _figure(_short(found.largest_difference), "largest logit difference"),
        _figure(_short(found.relative_difference), f"relative, of {found.bound:g} allowed", _share(found)),
    ]
    chips = [TITLES[done.format], done.dtype or "", size(done.bytes)]
    lines = [f"Read back by {escape(found.read_by)}, it answers {found.prompts} prompts as the model in memory does."]
    if done.rounded is not None:
        lines.append(f"From the same weights rounded in memory it is {_short(done.rounded.relative_difference)} away.")
    if done.from_quantised is not None:
        far = _short(done.from_quantised.relative_difference)
        lines.append(f"It was trained on a quantised base; merged onto floats, its logits moved by {far} (relative).")
    pushed = ""
    if done.pushed_to is not None:
        address = escape(done.pushed_to)
        pushed = f'<div>On the hub: <a href="{address}" target="_blank" rel="noopener">{address}</a></div>'
    head = f'<span class="nt-tick">✓</span><span class="nt-name">{escape(done.path.name)}</span>'
    return (
        f'<div class="nt-proof" role="status"><div class="nt-row">{head}{"".join(map(chip, chips))}</div>'
        f'<div class="nt-figures">{"".join(figures)}</div>'
        f'<div class="nt-soft">{" ".join(lines)}</div>{pushed}'
        f'<div class="nt-heading" style="margin-top:10px">Where it is</div>'
        f'<div class="nt-place">{escape(str(done.path))}</div>'
        f'<div class="nt-heading" style="margin-top:8px">Load it <span class="nt-soft nt-small" '
        f'style="font-weight:400">one click selects all of it</span></div><pre>{escape(done.loading)}</pre></div>'
    )


def _figure(number: str, words: str, share: float | None = None) -> str:
    gauge = (
        "" if share is None else f'<div class="nt-gauge"><div style="width:max(4px,{100 * share:.1f}%)"></div></div>'
    )
    return f'<div><b>{number}</b><span class="nt-soft nt-small">{words}</span>{gauge}</div>'


def _share(found: Proof) -> float:
    """How much of what is allowed is used, 0 to 1."""
    return min(1.0, found.relative_difference / found.bound) if found.bound else 0.0


def _short(value: float) -> str:
    """A small number as people write it: 0, 0.0021, 0.37, 5.2."""
    return "0" if value == 0 else f"{value:.2g}"
