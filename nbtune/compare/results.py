"""What columns made of a set of prompts: the answers, the measures of each column, and whether a difference is real."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nbtune._files import atomic_file
from nbtune.errors import NbtuneError
from nbtune.infer.columns import BASE

Floats = npt.NDArray[np.float64]

SUFFIXES = (".csv", ".jsonl", ".json", ".md")
RESAMPLES = 2000  # of a bootstrap
FEWEST = 10  # rows; of fewer the intervals would be too narrow to be told
DIFFERENCES = "Differences to the base, each with its 95 % interval; real where that leaves out zero."
MEASURES = ("perplexity", "exact_match", "rouge_1", "rouge_l")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row in one column. A measure is None where the row has no reference, or could not be read."""

    answer: str | None = None  # None where there is nothing to answer: the row is plain text, or `problem`
    finished: str | None = None  # why the answer ended: end_of_turn, max_new_tokens, context
    tokens: int = 0  # of the answer
    tokens_per_second: float | None = None
    loss: float | None = None  # negative log-likelihood of the whole reference, in nats
    reference_tokens: int = 0
    exact_match: bool | None = None
    rouge_1: float | None = None
    rouge_l: float | None = None
    problem: str = ""  # why something is missing

    @property
    def perplexity(self) -> float | None:
        return None if self.loss is None else _perplexity(self.loss, self.reference_tokens)


@dataclasses.dataclass(frozen=True)
class ResultRow:
    """One prompt, and what each column made of it."""

    place: str  # "row 17"
    prompt: str
    reference: str | None
    cells: dict[str, Cell]


@dataclasses.dataclass(frozen=True)
class Difference:
    """A measure of a column less that of the base, over the rows that both have, with a 95 % interval."""

    value: float
    lower: float
    upper: float
    rows: int

    @property
    def real(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.lower > 0 or self.upper < 0

    def text(self, digits: int) -> str:
        """For people: `+0.05 (0.01 to 0.09), real`."""
        said = f"{self.value:+.{digits}f} ({self.lower:.{digits}f} to {self.upper:.{digits}f})"
        return f"{said}, real" if self.real else said


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The measures of a column over all rows that have them; None where none has."""

    column: str
    rows: int  # that it answered or read
    perplexity: float | None  # of a token of the references
    exact_match: float | None  # share of the rows
    rouge_1: float | None  # F1, mean of the rows
    rouge_l: float | None
    tokens_per_second: float | None  # of one answer, while its batch is written
    mean_tokens: float | None  # of an answer
    against_base: dict[str, Difference]  # measure -> difference; only where there are `FEWEST` rows


@dataclasses.dataclass(frozen=True)
class Results:
    """Answers and measures of all columns, in the order of the rows."""

    columns: tuple[str, ...]
    rows: tuple[ResultRow, ...]
    notes: tuple[str, ...] = ()  # what a person should know
    seed: int = 0  # of the bootstrap

    def metrics(self) -> list[Metrics]:
        """The measures of each column; the same results give the same intervals."""
        return [self._metrics(column) for column in self.columns]

    def _metrics(self, column: str) -> Metrics:
        cells = [row.cells[column] for row in self.rows]
        answered = [cell for cell in cells if cell.answer is not None]
        speeds = [cell.tokens_per_second for cell in answered if cell.tokens_per_second]
        measures = {name: _measure(cells, name) for name in MEASURES}
        return Metrics(
            column,
            rows=sum(cell.answer is not None or cell.loss is not None for cell in cells),
            perplexity=measures["perplexity"],
            exact_match=measures["exact_match"],
            rouge_1=measures["rouge_1"],
            rouge_l=measures["rouge_l"],
            tokens_per_second=float(np.mean(speeds)) if speeds else None,
            mean_tokens=float(np.mean([cell.tokens for cell in answered])) if answered else None,
            against_base=self._against_base(column) if column != BASE and BASE in self.columns else {},
        )

    def _against_base(self, column: str) -> dict[str, Difference]:
        pairs = [(row.cells[column], row.cells[BASE]) for row in self.rows]
        found = {}
        for name in MEASURES:
            sums = [(_sums(mine, name), _sums(base, name)) for mine, base in pairs]
            both = [(*mine, *base) for mine, base in sums if mine is not None and base is not None]
            if len(both) >= FEWEST:
                found[name] = _bootstrap(np.array(both), math.exp if name == "perplexity" else float, self.seed)
        return found

    def table(self) -> list[dict[str, Any]]:
        """A dict for each row: place, prompt, reference, then the answer and the measures of each column."""
        return [_flat(row) for row in self.rows]

    def summary(self) -> list[dict[str, Any]]:
        """A dict for each column: its measures, and how they differ from the base's, for people."""
        return [_summary(metrics) for metrics in self.metrics()]

    def write(self, path: str | Path) -> Path:
        """Write to a .csv, .jsonl, .json or .md file, whole or not at all. Raises NbtuneError where it is there.

        A .csv or .jsonl file has the rows; .json and .md the measures and the notes too. In a .csv, text that a
        spreadsheet would compute (`=1+1`) has an apostrophe before it.
        """
        path = check_target(path)
        text = {".csv": self._csv, ".jsonl": self._jsonl, ".json": self._json, ".md": self._markdown}[
            path.suffix.lower()
        ]
        try:
            with atomic_file(path) as temporary:
                temporary.write_bytes(text().encode("utf-8", "replace"))
        except OSError as error:
            raise NbtuneError("The results cannot be written", str(error), "Choose another file.") from error
        return path

    @property
    def footnotes(self) -> tuple[str, ...]:
        """What must be said of the summary."""
        compared = any(metrics.against_base for metrics in self.metrics())
        return ((DIFFERENCES,) if compared else ()) + tuple(self.notes)

    def _csv(self) -> str:
        file = io.StringIO()
        table = self.table()
        writer = csv.writer(file)
        writer.writerow([_neutral(name) for name in table[0]] if table else [])
        writer.writerows([_neutral(value) for value in row.values()] for row in table)
        return file.getvalue()

    def _jsonl(self) -> str:
        return "".join(_dumped(row) + "\n" for row in self.table())

    def _json(self) -> str:
        metrics = [dataclasses.asdict(metrics) for metrics in self.metrics()]
        whole = {"columns": self.columns, "metrics": metrics, "notes": self.notes, "rows": self.table()}
        return _dumped(whole, indent=2) + "\n"

    def _markdown(self) -> str:
        notes = "".join(f"- {_escaped(note)}\n" for note in self.footnotes)
        return "\n".join(
            part for part in (_markdown_table(self.summary()), notes, _markdown_table(self.table())) if part
        )


def check_target(path: str | Path) -> Path:
    """Raise NbtuneError where results could not be written to `path`: before hours of work, not after."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise NbtuneError(
            "Results are not written in this format", f"{path.name} does not end in {', '.join(SUFFIXES)}."
        )
    if path.exists():
        raise NbtuneError("The file is there already", f"{path} is not overwritten.", "Choose another name.")
    return path


def _measure(cells: Sequence[Cell], name: str) -> float | None:
    sums = [found for cell in cells if (found := _sums(cell, name)) is not None]
    if not sums:
        return None
    total, weight = (sum(part) for part in zip(*sums, strict=True))
    return _perplexity(total, weight) if name == "perplexity" else total / weight


def _sums(cell: Cell, name: str) -> tuple[float, float] | None:
    """What a row adds to a measure: numerator and denominator; None where it has no such measure."""
    if name == "perplexity":
        return None if cell.loss is None or not math.isfinite(cell.loss) else (cell.loss, cell.reference_tokens)
    value = {"exact_match": cell.exact_match, "rouge_1": cell.rouge_1, "rouge_l": cell.rouge_l}[name]
    return None if value is None else (float(value), 1.0)


def _perplexity(loss: float, tokens: float) -> float:
    return math.exp(min(loss / tokens, 700.0))  # e to the 710 is no float


def _bootstrap(sums: Floats, scale: Callable[[float], float], seed: int) -> Difference:
    """A difference of two ratios of sums, and where it lies in 95 % of the draws of as many rows.

    sums: [rows, 4], numerator and denominator of the column, then of the base. Both are drawn together (paired).
    """
    rng = np.random.default_rng(seed)
    count = len(sums)

    def difference(totals: Floats) -> float:
        return scale(min(totals[0] / totals[1], 700.0)) - scale(min(totals[2] / totals[3], 700.0))

    drawn = [difference(rng.multinomial(count, np.full(count, 1 / count)) @ sums) for _ in range(RESAMPLES)]
    lower, upper = np.quantile(drawn, (0.025, 0.975))
    return Difference(difference(sums.sum(axis=0)), float(lower), float(upper), count)


def _flat(row: ResultRow) -> dict[str, Any]:
    flat: dict[str, Any] = {"row": row.place, "prompt": row.prompt, "reference": row.reference}
    for column, cell in row.cells.items():
        flat[f"{column} answer"] = cell.answer
        flat[f"{column} perplexity"] = cell.perplexity
        flat[f"{column} exact match"] = cell.exact_match
        flat[f"{column} ROUGE-1"] = cell.rouge_1
        flat[f"{column} ROUGE-L"] = cell.rouge_l
        flat[f"{column} tokens"] = cell.tokens
        flat[f"{column} problem"] = cell.problem
    return flat


def _summary(metrics: Metrics) -> dict[str, Any]:
    against = metrics.against_base

    def shown(name: str, value: float | None, digits: int) -> str:
        if value is None:
            return ""
        return f"{value:.{digits}f}" + (f", {against[name].text(digits)}" if name in against else "")

    return {
        "column": metrics.column,
        "rows": metrics.rows,
        "perplexity": shown("perplexity", metrics.perplexity, 2),
        "exact match": shown("exact_match", metrics.exact_match, 3),
        "ROUGE-1": shown("rouge_1", metrics.rouge_1, 3),
        "ROUGE-L": shown("rouge_l", metrics.rouge_l, 3),
        "tokens/s": shown("", metrics.tokens_per_second, 1),
        "tokens an answer": shown("", metrics.mean_tokens, 1),
    }


def _dumped(value: Any, indent: int | None = None) -> str:
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _neutral(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula, as text."""
    return f"'{value}" if isinstance(value, str) and value.lstrip()[:1] in ("=", "+", "-", "@") else value


def _markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join("| " + " | ".join(_escaped(cell) for cell in line) + " |\n" for line in lines)


def _escaped(value: Any) -> str:
    """As the text of one cell: no mark-up, no line break."""
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text = html.escape(text, quote=False).replace("\\", "\\\\").replace("|", "\\|")
    for mark in "`*_[]":
        text = text.replace(mark, f"\\{mark}")
    return "<br>".join(text.split("\n")).replace("\r", "")
