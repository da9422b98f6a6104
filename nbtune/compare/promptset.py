"""A data set through all columns: their answers, and how near these are to the references.

    results = nt.evaluate("rows.jsonl", "base", run, limit=50)
    results.metrics()                  # perplexity, exact match, ROUGE, tokens/s; and the differences to the base
    results.write("results.csv")

A page follows it and may stop it:

    evaluation = Evaluation(engine, read_prompts("rows.jsonl"))
    for progress in evaluation.steps(should_stop):
        progress.done, progress.total, progress.seconds, progress.eta_seconds
    evaluation.results()
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nbtune.compare.likeness import rouge_1, rouge_l, same, words
from nbtune.compare.prompts import Data, Prompt, PromptSet, PromptTokens, read_prompts, tokens_of
from nbtune.compare.results import Cell, ResultRow, Results
from nbtune.errors import NbtuneError
from nbtune.infer.base import Base
from nbtune.infer.batch import Answer, Delta
from nbtune.infer.columns import ColumnLike, Lineup, line_up
from nbtune.infer.engine import Engine
from nbtune.infer.sampling import GREEDY, Sampling
from nbtune.models import load_tokenizer
from nbtune.spec import DataSpec, RunSpec

__all__ = ["Evaluation", "Progress", "evaluate", "read_prompts"]

ROWS_AT_ONCE = 16  # of a batch: prompts times columns
TOKENS_AT_ONCE = 16_384  # of its cache, padding included


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far an evaluation is."""

    done: int  # answers, of all columns
    total: int
    seconds: float  # since it began

    @property
    def eta_seconds(self) -> float | None:
        """How long the rest will take; None before the first answer."""
        return self.seconds / self.done * (self.total - self.done) if self.done else None


def evaluate(
    data: Data,
    *columns: ColumnLike,
    limit: int | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    all_rows: bool = False,
    column_by_column: bool = False,
    runs_dir: str | Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Results:
    """Let the base and these columns answer the prompts of `data`, and measure the answers by its references.

    data: what trains a run (a DataSpec, a source such as a file, or rows), rows without answers, or a list of texts
    to ask. Of a DataSpec, or a source that one of the columns was trained on, the held-out rows are used, or
    `all_rows`; of these the first `limit`. Columns are those of `arena`. column_by_column: write one column's answers
    after another's, so that each has its own speed. An interrupt (Ctrl-C, the notebook's stop) ends it with the rows
    that are done.

    Raises NbtuneError where the data has no rows, or a column does not exist or belongs to another base model.
    """
    lineup = line_up(columns, runs_dir)
    data, notes = _trained_on(data, lineup)
    tokenizer = load_tokenizer(lineup.model) if isinstance(data, DataSpec) and data.recipe else None
    prompts = read_prompts(data, limit=limit, all_rows=all_rows, tokenizer=tokenizer)
    if not all_rows:
        prompts = dataclasses.replace(prompts, notes=(*notes, *prompts.notes))
    if max_new_tokens < 1:
        raise NbtuneError("Nothing to generate", f"max_new_tokens is {max_new_tokens}.", "Ask for one or more.")
    engine = Engine.of(lineup)
    evaluation = Evaluation(
        engine,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        column_by_column=column_by_column,
    )
    try:
        with contextlib.suppress(KeyboardInterrupt):
            for progress in evaluation.steps():
                if on_progress is not None:
                    on_progress(progress)
        return evaluation.results()
    finally:
        engine.close()


class Evaluation:
    """Prompts on their way through an engine's columns, a few at a time. `results` may be asked at any moment."""

    def __init__(
        self,
        engine: Engine,
        prompts: PromptSet,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        column_by_column: bool = False,
    ) -> None:
        self.total = len(prompts.prompts) * len(engine.columns)  # answers
        self._engine, self._prompts, self._notes = engine, prompts.prompts, prompts.notes
        self._sampling, self._max_new_tokens, self._seed = sampling, max_new_tokens, seed
        self._column_by_column = column_by_column
        self._rows: list[ResultRow] = []
        self._done = 0
        self._began = 0.0

    def steps(self, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Progress]:
        """Progress after every answer. Ends within one token where `should_stop`, and keeps the rows that are whole."""
        self._began = time.perf_counter()
        yield self._progress()
        for rows in self._chunks():
            try:
                together = [[item for items in rows for item in items]]
                for group in zip(*rows, strict=True) if self._column_by_column else together:
                    for _ in self._read(group, should_stop):
                        yield self._progress()
                    for _ in self._write(group, should_stop):
                        yield self._progress()
            finally:
                whole = [items for items in rows if all(item.done for item in items)]
                self._rows += [items[0].row({item.column: item.cell for item in items}) for items in whole]
            if len(whole) < len(rows):
                return

    def results(self) -> Results:
        """What is done by now."""
        return Results(self._engine.columns, tuple(self._rows), (*self._notes, *self._said()))

    def _chunks(self) -> Iterator[list[list[_Item]]]:
        """A few prompts at a time, fewer long ones, so that the memory of a batch is bounded."""
        columns = 1 if self._column_by_column else len(self._engine.columns)
        rows: list[list[_Item]] = []
        longest = 0
        for prompt in self._prompts:
            items = self._items(prompt)
            longest = max(longest, items[0].length + self._max_new_tokens)
            batch = (len(rows) + 1) * columns
            if rows and (batch > ROWS_AT_ONCE or batch * longest > TOKENS_AT_ONCE):
                yield rows
                rows, longest = [], items[0].length + self._max_new_tokens
            rows.append(items)
        yield rows

    def _items(self, prompt: Prompt) -> list[_Item]:
        read: dict[Base, tuple[PromptTokens, str]] = {}
        for base in dict.fromkeys(map(self._engine.base_of, self._engine.columns)):
            try:
                read[base] = tokens_of(prompt, base.tokenizer), ""
            except NbtuneError as error:
                read[base] = PromptTokens([], []), _line(error)
        return [_Item(prompt, *read[self._engine.base_of(column)], column) for column in self._engine.columns]

    def _read(self, items: Sequence[_Item], should_stop: Callable[[], bool]) -> Iterator[None]:
        """Score the references and make the answers ready; a turn for each item that there is nothing to write of."""
        for item in items:
            if should_stop():
                return
            item.score(self._engine)
            item.begin(self._engine, self._sampling, max_new_tokens=self._max_new_tokens, seed=self._seed)
            if item.done:
                self._done += 1
                yield

    def _write(self, items: Sequence[_Item], should_stop: Callable[[], bool]) -> Iterator[None]:
        """A turn for each answer that is finished."""
        writing = {item.answer: item for item in items if item.answer is not None}
        if should_stop() or not writing:
            return
        with contextlib.closing(self._engine.write(list(writing), should_stop)) as deltas:
            for answer, delta in deltas:
                writing[answer].add(delta)
                if writing[answer].done:
                    self._done += 1
                    yield

    def _said(self) -> Iterator[str]:
        if len(self._rows) < len(self._prompts):
            yield f"Stopped after {len(self._rows):,} of {len(self._prompts):,} rows."
        if self._rows and all(row.reference is None for row in self._rows):
            yield "No row has a reference: there are answers and speeds, and nothing to measure them by."
        found = [(row.place, cell.problem) for row in self._rows for cell in row.cells.values() if cell.problem]
        if found:
            count = len({place for place, _ in found})
            yield f"{count:,} of {len(self._rows):,} rows could not be used whole; {found[0][0]}: {found[0][1]}"

    def _progress(self) -> Progress:
        return Progress(self._done, self.total, time.perf_counter() - self._began)


class _Item:
    """One prompt in one column, on its way to a cell."""

    def __init__(self, prompt: Prompt, tokens: PromptTokens, problem: str, column: str) -> None:
        self.column = column
        self.answer: Answer | None = None
        self.cell = Cell(problem=problem)
        self.done = False
        self.length = len(tokens.prompt)
        self._prompt, self._tokens, self._text = prompt, tokens, ""

    def row(self, cells: dict[str, Cell]) -> ResultRow:
        return ResultRow(self._prompt.place, self._prompt.text, self._prompt.reference, cells)

    def score(self, engine: Engine) -> None:
        """Measure how likely the reference is, where there is one."""
        if not self._tokens.reference:
            return
        try:
            score = engine.score(self.column, *self._tokens)
        except NbtuneError as error:
            self._fail(error)
        else:
            self.cell = dataclasses.replace(self.cell, loss=score.loss, reference_tokens=score.tokens)

    def begin(self, engine: Engine, sampling: Sampling, **how: int) -> None:
        """Make the answer that is to be written; done where there is nothing to answer."""
        if self._prompt.chat.raw or not self._tokens.prompt:
            self.done = True
            return
        try:
            self.answer = engine.continuation(self.column, self._tokens.prompt, sampling, **how)
        except NbtuneError as error:
            self._fail(error)
            self.done = True

    def add(self, delta: Delta) -> None:
        self._text += delta.text
        if delta.finished in (None, "stopped"):
            return
        self.done = True
        self.cell = dataclasses.replace(
            self.cell,
            answer=self._text,
            finished=delta.finished,
            tokens=delta.stats.tokens,
            tokens_per_second=delta.stats.tokens_per_second or None,
        )
        if self._prompt.reference is not None:
            answer, reference = words(self._text), words(self._prompt.reference)
            self.cell = dataclasses.replace(
                self.cell,
                exact_match=same(self._text, self._prompt.reference),
                rouge_1=rouge_1(answer, reference),
                rouge_l=rouge_l(answer, reference),
            )

    def _fail(self, error: NbtuneError) -> None:
        self.cell = dataclasses.replace(self.cell, problem=_line(error))


def _trained_on(data: Data, lineup: Lineup) -> tuple[Data, list[str]]:
    """A source that columns were trained on, with the split of the first of them, and what to say of that."""
    if not isinstance(data, str | Path):
        return data, []
    specs = {column.name: column.folder.parent / "spec.yaml" for column in lineup.columns}
    trained = {name: RunSpec.from_yaml(file).data for name, file in specs.items() if file.is_file()}
    trained = {name: spec for name, spec in trained.items() if os.path.realpath(spec.source) == os.path.realpath(data)}
    if not trained:
        return data, []
    first, split = next(iter(trained.items()))
    notes = [f"These are rows that {first} held out; --all-rows (all_rows=True) takes the others too."]
    notes += [f"{name} was trained with another split or recipe." for name, spec in trained.items() if spec != split]
    return split, notes


def _line(error: NbtuneError) -> str:
    return " ".join(str(error).splitlines())
