"""stdlib-docs: thousands of clean rows, the same in every process, with nothing shared across the split."""

from __future__ import annotations

import collections
import hashlib
import subprocess
import sys
import time

import pytest

from nbtune.data import read_rows, stdlib_docs
from nbtune.errors import DataError
from nbtune.spec import DataSpec

HASH = (
    "import hashlib; from nbtune.data import stdlib_docs\n"
    "print(hashlib.sha256(repr(stdlib_docs.rows()).encode()).hexdigest())\n"
    "import sys; print(sorted({'tkinter', 'antigravity', 'this', 'idlelib', 'asyncio'} & set(sys.modules)))"
)


@pytest.fixture(scope="module")
def rows() -> tuple[stdlib_docs.Row, ...]:
    return stdlib_docs.rows()


def test_the_same_in_every_process_and_silent(rows):
    outputs = {
        subprocess.run(
            [sys.executable, "-c", HASH], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1")
    }
    assert outputs == {hashlib.sha256(repr(rows).encode()).hexdigest() + "\n[]\n"}


def test_quick():
    """2 s on an idle machine; on busy cores processor time itself doubles."""
    stdlib_docs.rows.cache_clear()
    start = time.process_time()
    stdlib_docs.rows()
    assert time.process_time() - start < 8


def test_thousands_of_different_rows(rows):
    assert len(rows) > 4000
    assert len({row.question for row in rows}) == len(rows)
    assert len({row.answer.casefold() for row in rows}) == len(rows)
    assert len({row.module for row in rows}) > 100


def test_rows_are_clean(rows):
    for row in rows:
        assert 20 <= len(row.answer) <= 480 or row.answer.startswith("`")
        assert row.answer.isprintable()
        assert "  " not in row.answer or row.answer[0] == "`"  # a default of two blanks
        assert ">>>" not in row.answer
        assert row.answer[-1] in ".!?`"
        assert row.question[-1] in "?."
        assert f"`{row.module}" in row.question or row.module == "builtins"


def test_well_known_rows(rows):
    answers = collections.defaultdict(list)
    for row in rows:
        answers[row.question.split("`")[1]].append(row.answer)
    assert "Join two or more pathname components, inserting '/' as needed." in answers["os.path.join"][0]
    assert "`textwrap.fill(text, width=70, **kwargs)`" in answers["textwrap.fill"]
    assert "`json.dumps(" in answers["json.dumps"][1]
    assert answers["len"][0] == "Return the number of items in a container."
    assert answers["str.split"]
    assert answers["itertools.chain"]
    assert not [name for name in answers if name.startswith(("posixpath", "_", "test.", "idlelib", "ntpath"))]


@pytest.mark.parametrize("seed", range(6))
def test_nothing_leaks_into_the_evaluation(rows, seed):
    train, held_out = stdlib_docs.split(rows, 0.05, seed)
    assert len(train) + len(held_out) == len(rows)
    assert 0.03 * len(rows) < len(held_out) < 0.06 * len(rows)
    assert not {row.module for row in train} & {row.module for row in held_out}
    assert len({row.module for row in held_out}) >= 3
    assert not {row.answer.casefold() for row in train} & {row.answer.casefold() for row in held_out}
    names = {row.question.split("`")[1] for row in train}
    assert not names & {row.question.split("`")[1] for row in held_out}


def test_splits_follow_the_seed(rows):
    assert stdlib_docs.split(rows, 0.05, 0) == stdlib_docs.split(rows, 0.05, 0)
    assert stdlib_docs.split(rows, 0.05, 0)[1] != stdlib_docs.split(rows, 0.05, 1)[1]
    assert stdlib_docs.split(rows, 0.0, 0)[1] == []


def test_as_data():
    data = read_rows(DataSpec(source="stdlib-docs"))
    assert data.format == "messages"
    assert [message["role"] for message in data.train[0].messages] == ["user", "assistant"]
    assert sorted(data.train_numbers + data.eval_numbers) == list(range(1, len(data.train) + len(data.eval) + 1))
    with pytest.raises(DataError, match="not in the form alpaca"):
        read_rows(DataSpec(source="stdlib-docs", format="alpaca"))


def test_python_without_docstrings(monkeypatch):
    monkeypatch.setattr(stdlib_docs, "_parsed", lambda: iter(()))
    monkeypatch.setattr(stdlib_docs, "_inspected", lambda: iter(()))
    with pytest.raises(DataError, match="cannot be made here"):
        stdlib_docs.rows.__wrapped__()
