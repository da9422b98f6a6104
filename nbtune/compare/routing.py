r"""Routers from runs: the door `nbtune.router`.

router = nt.router("amber-heron", "quiet-otter")                       # by likeness to their training data
router = nt.router("amber-heron", patterns={"amber-heron": r"(?i)\\bpython\\b"})
router = nt.router("amber-heron", rule=lambda prompt: "amber-heron" if "?" in prompt else None)
router.route("What does os.path.join do?")                             # Decision(column="amber-heron", ...)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nbtune.data import Chat, read_rows
from nbtune.errors import NbtuneError
from nbtune.infer.columns import Column, ColumnLike, line_up
from nbtune.infer.router import ByPattern, ByRule, BySimilarity, Router, Rule
from nbtune.infer.similarity import Embedder, Index, Nearest
from nbtune.spec import RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def router(
    *columns: ColumnLike,
    runs_dir: str | Path | None = None,
    rule: Rule | None = None,
    patterns: Mapping[str, str] | None = None,
    threshold: float | None = None,
    prompts: Mapping[str, Sequence[str]] | None = None,
    refresh: bool = False,
    embedder: Embedder | None = None,
) -> Router:
    """Choose for each prompt which of these columns answers it, or the base.

    Columns are those of `arena`. `rule` is a function from a prompt to a column's name or None; `patterns` are regular
    expressions of RE2 by column; without either, the column whose training prompts are most like the prompt answers,
    and the base where the score is below `threshold`. Indexes of the training prompts are kept beside each run as
    `router.safetensors` and `router.json`; `refresh` makes them again. An adapter without its run needs its `prompts`.
    `embedder` is the base model where it is in memory already; else it is loaded. Raises NbtuneError where a column
    does not exist, or there is nothing to compare with.
    """
    lineup = line_up(columns, runs_dir)
    lineup.require_one_base()
    names = [column.name for column in lineup.columns]
    if rule is not None and patterns is not None:
        raise NbtuneError("A router goes by a rule or by patterns", "Both are given.", "Give one.")
    if rule is not None:
        return ByRule(rule, names)
    if patterns is not None:
        return ByPattern(patterns, names)
    if unknown := [name for name in prompts or {} if name not in names]:
        raise NbtuneError(f"There is no column {unknown[0]!r}", f"There are: {', '.join(names)}.")
    if not names:
        raise NbtuneError("There is nothing to route to", "No column is given but the base.", "Name a run.")
    embedder = embedder or Embedder.of_model(lineup.model)
    return by_likeness(lineup.columns, embedder, prompts or {}, threshold=threshold, refresh=refresh)


def by_likeness(
    columns: Sequence[Column],
    embedder: Embedder,
    prompts: Mapping[str, Sequence[str]],
    *,
    threshold: float | None = None,
    refresh: bool = False,
) -> Router:
    """The router that chooses by likeness to the data that each of these columns was trained on, or its `prompts`."""
    indexes = {column.name: _index(column, embedder, prompts.get(column.name), refresh) for column in columns}
    return BySimilarity(Nearest(indexes, embedder), threshold)


def _index(column: Column, embedder: Embedder, prompts: Sequence[str] | None, refresh: bool) -> Index:
    folder = column.folder.parent if (column.folder.parent / "spec.yaml").is_file() else column.folder
    if prompts is None and not refresh and (folder / "router.json").is_file():
        return Index.read(folder)
    if prompts is not None:
        index = Index.of_texts(prompts, embedder, "prompts that were given")
    elif (folder / "spec.yaml").is_file():
        spec = RunSpec.from_yaml(folder / "spec.yaml")
        index = Index.of_texts(_prompts(spec, embedder.tokenizer), embedder, spec.data.source)
    else:
        raise NbtuneError(
            f"Nobody knows what {column.name} was trained on",
            f"{column.folder} is an adapter without its run.",
            f"Give some of its prompts: prompts={{{column.name!r}: [...]}}, or route by a rule or a pattern.",
        )
    index.save(folder)
    return index


def _prompts(spec: RunSpec, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the training rows ask first; of plain text, the text."""
    return [_prompt(chat) for chat in read_rows(spec.data, tokenizer=tokenizer).train]


def _prompt(chat: Chat) -> str:
    asked = [message["content"] for message in chat.messages if message["role"] == "user"]
    return str(asked[0] if asked else chat.messages[-1]["content"])
