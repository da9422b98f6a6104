"""A row as the model reads it, in HTML: every token coloured by whether it carries loss, white space made visible."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbtune.data.report import Piece

SHOWN = 3000  # tokens of a row: more would make the notebook large
_LOOKS = {"context": "nt-t0", "trained": "nt-t1", "end": "nt-tE"}
_SPECIAL = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")  # as the whole text of a token: <|im_end|>, <s>, [INST]
_BLANKS = re.compile(r" {2,}| +(?=\n)|\t|\n|\u00a0")
_MARKS = {"\n": "↵", "\t": "⇥", " ": "·", "\u00a0": "⍽"}

LEGEND = (
    '<span class="nt-t1">&nbsp;trained&nbsp;</span> <span class="nt-tE">&nbsp;end of turn&nbsp;</span> '
    '<span class="nt-t0">context, no loss</span>'
)


def row(pieces: Sequence[Piece], max_length: int) -> str:
    """The tokens of one example; those after `max_length` are shown as cut."""
    kept, cut = pieces[:max_length], pieces[max_length:]
    html = _spans(kept[:SHOWN])
    hidden = len(pieces) - min(len(kept), SHOWN)
    if cut and len(kept) <= SHOWN:
        room = max(0, SHOWN - len(kept))
        html += f'<b class="nt-cut">cut here, after {max_length:,} tokens</b><s>{_spans(cut[:room])}</s>'
        hidden -= len(cut[:room])
    return html + (f'<b class="nt-cut">{hidden:,} more tokens are not shown</b>' if hidden else "")


def _spans(pieces: Sequence[Piece]) -> str:
    runs = itertools.groupby(pieces, key=lambda piece: _LOOKS[piece.kind])
    return "".join(f'<span class="{look}">{"".join(map(_token, run))}</span>' for look, run in runs)


def _token(piece: Piece) -> str:
    special = ' class="nt-special"' if _SPECIAL.fullmatch(piece.text) else ""
    return f"<i{special}>{_visible(piece.text)}</i>"


def _visible(text: str) -> str:
    """Escaped, with a sign for each line break, tab and blank that could not be seen."""
    parts = []
    place = 0
    for match in _BLANKS.finditer(text):
        blanks = match[0]
        signs = _MARKS[blanks[0]] * len(blanks)
        parts += [escape(text[place : match.start()]), f"<u>{signs}</u>", blanks if blanks in "\n\t" else ""]
        place = match.end()
    return "".join([*parts, escape(text[place:])])
