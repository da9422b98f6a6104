"""Ask several questions of several columns at once, without a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nbtune.infer.columns import ColumnLike, line_up
from nbtune.infer.engine import Engine
from nbtune.infer.sampling import GREEDY, Sampling


def ask(
    questions: Sequence[str],
    *columns: ColumnLike,
    runs_dir: str | Path | None = None,
    max_new_tokens: int = 80,
    sampling: Sampling = GREEDY,
) -> list[dict[str, str]]:
    """The answers as one dict a question: `{"question": ..., "base": ..., "<run id>": ...}`.

    Columns are those of `arena`; the base is always one of them. Raises NbtuneError as `arena` does.
    """
    lineup = line_up(columns, runs_dir)
    engine = Engine.of(lineup)
    try:
        return [_answers(engine, question, max_new_tokens, sampling) for question in questions]
    finally:
        engine.close()


def _answers(engine: Engine, question: str, max_new_tokens: int, sampling: Sampling) -> dict[str, str]:
    texts = dict.fromkeys(engine.columns, "")
    messages = [{"role": "user", "content": question}]
    for delta in engine.stream(dict.fromkeys(texts, messages), sampling, max_new_tokens=max_new_tokens):
        texts[delta.column] += delta.text
    return {"question": question, **{column: text.strip() for column, text in texts.items()}}
