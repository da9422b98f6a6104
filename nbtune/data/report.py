"""What a data step shows of the data before anything is trained on it.

data = report(spec.data, load_tokenizer(spec.model), spec.training.max_length)
data.form, data.reason, data.dropped      # "alpaca", "columns instruction, input, output", {reason: [row, ...]}
data.raw(17)                              # row 17 as it stands in the source
data.pieces(0)                            # the first example as the model reads it, token by token

It is read, rendered and tokenised by what training calls: what is shown is what is learnt.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from nbtune.chat_templates import chat_template
from nbtune.data import formats, render, sources
from nbtune.data.dataset import CUT_AWAY, OnStatus, Rows, ignore_status, sort_rows, spread
from nbtune.data.formats import Chat
from nbtune.data.packing import IGNORED
from nbtune.data.recipe import StepReport
from nbtune.data.render import Rendered
from nbtune.errors import DataError
from nbtune.spec import DataSpec, SourceSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["context", "trained", "end"]

_AT_ONCE = 1000  # rows tokenised between two words of progress
_EXAMPLE = 80  # characters shown of a column's value


@dataclasses.dataclass(frozen=True)
class Piece:
    """One token of an example: its text, and whether it is learnt. `end` is the token that ends an answer."""

    text: str
    kind: Kind


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What became of the rows. Examples are counted from 0, training rows first; rows from 1, as in the source."""

    form: str  # as in DataSpec.format
    reason: str  # why it is this form
    columns: dict[str, str]  # column -> the beginning of its first value
    mapping: dict[str, str]  # field of the form -> column or template it is made from; empty where they are the same
    total: int  # rows in the source
    train: int  # training rows used, after max_rows
    held_out: int  # held-out rows used, after max_eval_rows
    dropped: dict[str, list[int]]  # reason -> numbers of the rows that are left out
    unusable: dict[str, list[int]]  # reason -> numbers of the rows for which training would not start
    steps: list[StepReport]  # what each step of the recipe did
    notes: list[str]  # what a person should know
    lengths: npt.NDArray[np.int32]  # tokens of every example before it is cut; held-out ones are the last
    numbers: npt.NDArray[np.int64]  # the row that each example was made from
    max_length: int
    _rows: Rows = dataclasses.field(repr=False)
    _chats: Mapping[int, Chat] = dataclasses.field(repr=False)
    _tokenizer: PreTrainedTokenizerBase = dataclasses.field(repr=False)

    @property
    def kept(self) -> int:
        """Rows that are trained on or held out."""
        return self.train + self.held_out

    @property
    def longer(self) -> int:
        """Examples that are longer than max_length and lose their end; plain texts are split there."""
        return int(np.count_nonzero(self.lengths > self.max_length))

    @property
    def problem(self) -> DataError | None:
        """What training would raise because of the unusable rows."""
        return formats.unusable_error(self.unusable, self.total, "The data", self.place) if self.unusable else None

    def place(self, number: int) -> str:
        """Where a row stands: `row 17`, and of which source if there are several."""
        return self._rows.place(number)

    def raw(self, number: int) -> dict[str, Any]:
        """A row as it was read. Raises IndexError where there is no row of this number."""
        if not 1 <= number <= self.total:
            raise IndexError(f"there is no row {number}; rows are 1 to {self.total}")
        return self._rows.raw[number - 1]

    def pieces(self, index: int) -> list[Piece]:
        """Every token of one example, uncut: joined, their texts are the row as the template writes it.

        A letter that takes several tokens stands in the first; a beginning that the tokenizer adds has no text.
        """
        number = int(self.numbers[index])
        before = int(np.count_nonzero(self.numbers[:index] == number))  # a row may give an example for each turn
        return self.written(number)[before]

    def written(self, number: int, template: str | None = None) -> list[list[Piece]]:
        """The pieces of every example of a row that is used; as another chat template would write it, where given.

        Raises DataError where that template cannot show the row, ValueError where it is none.
        """
        tokenizer = self._tokenizer
        if template is not None:
            tokenizer = copy.copy(tokenizer)
            tokenizer.chat_template = chat_template(template)
        examples = next(render.render_many([self._chats[number]], tokenizer, [number]))
        added = set(tokenizer.added_tokens_decoder)
        return [list(_pieces(rendered, added)) for rendered in examples]

    def chat(self, number: int) -> Chat:
        """The chat that a row which is used was read as."""
        return self._chats[number]


def report(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    base_dir: Path | None = None,
    on_status: OnStatus = ignore_status,
) -> DataReport:
    """Read and tokenise what `spec` names, as training would.

    Rows that cannot be used are listed where training would raise. Raises DataError where the source cannot be read,
    its form is not known, or the template cannot show a row.
    """
    on_status(f"Reading {spec.source}")
    rows = sort_rows(spec, tokenizer=tokenizer, base_dir=base_dir, on_status=on_status)
    train, held_out = spread(len(rows.train), spec.max_rows), spread(len(rows.eval), spec.max_eval_rows)
    chats = {rows.train_numbers[i]: rows.train[i] for i in train}
    chats |= {rows.eval_numbers[i]: rows.eval[i] for i in held_out}
    lengths: list[int] = []
    numbers: list[int] = []
    missed: list[int] = []
    for number, rendered in _rendered(chats, tokenizer, on_status):
        lengths += [len(one.example) for one in rendered]
        numbers += [number] * len(rendered)
        if not any(one.example.cut(max_length).supervised for one in rendered):
            missed.append(number)
    return DataReport(
        form=rows.form.name,
        reason=rows.form.reason,
        columns=columns_of(rows.raw),
        mapping=rows.form.mapping,
        total=len(rows.raw),
        train=len(train),
        held_out=len(held_out),
        dropped=rows.left_out | ({CUT_AWAY: missed} if missed else {}),
        unusable=rows.unusable,
        steps=rows.steps,
        notes=rows.notes,
        lengths=np.array(lengths, dtype=np.int32),
        numbers=np.array(numbers, dtype=np.int64),
        max_length=max_length,
        _rows=rows,
        _chats=chats,
        _tokenizer=tokenizer,
    )


def _rendered(
    chats: Mapping[int, Chat], tokenizer: PreTrainedTokenizerBase, on_status: OnStatus
) -> Iterator[tuple[int, list[Rendered]]]:
    found = zip(chats, render.render_many(list(chats.values()), tokenizer, list(chats)), strict=True)
    for done in range(0, len(chats), _AT_ONCE):
        on_status(f"Tokenising {len(chats):,} rows" + (f", {done:,} done" if done else ""))
        yield from itertools.islice(found, _AT_ONCE)


def _pieces(rendered: Rendered, added: set[int]) -> Iterator[Piece]:
    example, starts = rendered.example, rendered.offsets[:, 0].tolist()
    learnt = (example.labels != IGNORED).tolist()
    # What stands between two tokens, such as blanks that a tokenizer drops, goes with the token before.
    borders = [0, *starts[1:], len(rendered.text)] if starts else []
    for index, (start, end) in enumerate(itertools.pairwise(borders)):
        last = learnt[index] and not (index + 1 < len(learnt) and learnt[index + 1])
        kind = (
            "context" if not learnt[index] else "end" if last and int(example.input_ids[index]) in added else "trained"
        )
        yield Piece(rendered.text[start:end], kind)


def read_columns(spec: SourceSpec, *, on_status: OnStatus = ignore_status) -> dict[str, str]:
    """Column -> the beginning of its first value, also where no form fits. Raises DataError if it cannot be read."""
    on_status(f"Reading {spec.source}")
    return columns_of(sources.read(spec, None, on_status))


def columns_of(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Column -> the beginning of its first value that is not empty."""
    found: dict[str, str] = {}
    for row in rows:
        for column, value in row.items():
            if not found.get(column) and value not in (None, ""):
                found[column] = _shown(value)
            else:
                found.setdefault(column, "")
    return found


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _EXAMPLE else text[: _EXAMPLE - 1] + "…"
