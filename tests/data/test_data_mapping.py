"""Plain tables: what the parts of a row are made of."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from nbtune.data import read_rows
from nbtune.data.mapping import made_of
from nbtune.errors import DataError
from nbtune.spec import DataSpec

ROWS = [
    {"question": "Who?", "context": "He.", "answer": "Him", "n o.": 1},
    {"question": "Why?", "context": None, "answer": "So", "n o.": 2},
]


def contents(columns: dict[str, str] | None, rows: list[dict] = ROWS, **settings) -> list[list[str]]:
    found = read_rows(DataSpec.from_rows(rows, columns=columns, eval_fraction=0, **settings))
    return [[message["content"] for message in chat.messages] for chat in found.train]


def test_columns_and_templates():
    assert contents({"prompt": "question", "completion": "answer"}) == [["Who?", "Him"], ["Why?", "So"]]
    columns = {"prompt": "{question}\n{context}", "completion": "{n o.}: {answer} {{x}}"}
    assert contents(columns) == [["Who?\nHe.", "1: Him {x}"], ["Why?\n", "2: So {x}"]]
    assert contents({"instruction": "question", "input": "context", "output": "answer", "system": "{answer}!"})[1] == [
        "So!", "Why?", "So",
    ]  # fmt: skip


def test_pairs_are_recognised_by_their_names():
    found = read_rows(DataSpec.from_rows(ROWS, eval_fraction=0))
    assert found.format == "prompt_completion"
    assert found.form.reason == "columns question and answer, read as prompt and completion"
    assert found.form.mapping == {"prompt": "question", "completion": "answer"}
    assert contents(None) == [["Who?", "Him"], ["Why?", "So"]]


def test_a_mapping_chooses_the_form():
    rows = [
        {"prompt": "no", "completion": "no", "dialog": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    ]
    assert contents({"conversations": "dialog"}, rows) == [["Q", "A"]]
    assert contents({"text": "{prompt}{completion}"}, rows) == [["nono"]]
    with pytest.raises(DataError, match="not in the form alpaca"):
        contents({"prompt": "prompt", "completion": "completion"}, rows, format="alpaca")


def test_rows_without_a_value_are_counted():
    rows = [*ROWS, {"question": "x", "answer": None}]
    with pytest.raises(DataError, match=r"1 row: `completion` is null \(first: row 3\)"):
        contents({"prompt": "question", "completion": "{answer}"}, rows)
    with pytest.raises(DataError, match="2 rows: `context` is a list, not text"):
        contents({"prompt": "{context}", "completion": "answer"}, [row | {"context": ["a"]} for row in ROWS])


@pytest.mark.parametrize(
    "source",
    ["contxt", "{contxt}", "{context} {answer.__class__}", "{context[0]}", "{0}", "{}", "{answer!r}", "{answer:>9}"],
)
def test_what_is_no_column(source):
    with pytest.raises(DataError, match="no column") as caught:
        contents({"prompt": source, "completion": "answer"})
    assert "`context`" in caught.value.message


def test_a_template_cannot_reach_into_values():
    row = {"a.b": "dotted", "a": "plain"}
    assert made_of({"prompt": "{a.b} {a} {a.__class__}"}, row) == {"prompt": "dotted plain "}


def test_unknown_parts():
    with pytest.raises(ValidationError, match="no part 'question'; there are prompt, completion"):
        DataSpec(columns={"question": "a"})
    assert DataSpec(columns={}).columns is None
