"""Broken inputs: each is a DataError or a refused spec with title, place and remedy, in little time and memory."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from nbtune.data import from_text, load_examples, read_rows
from nbtune.data.report import report
from nbtune.errors import DataError, NbtuneError
from nbtune.spec import DataSpec, RunSpec

GOOD = {"prompt": "Q", "completion": "A"}
MESSAGES = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def lines(*rows: Any) -> bytes:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()


def parquet(**columns: Any) -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def twice_named() -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["prompt", "prompt", "completion"])
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


# name of the file -> (bytes, what its error must say: what, where)
FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "cut off.json": (b'[{"prompt": "a", "completion": "b"}, {"prompt": "c', ("not JSON", "line 1, column 49")),
    "trailing comma.json": (b'[\n{"prompt": "a", "completion": "b"},\n]', ("not JSON", "line 3")),
    "trailing comma.jsonl": (b'{"prompt": "a", "completion": "b"},\n', ("not JSON", "line 1, column 35")),
    "single quotes.jsonl": (lines(GOOD, "{'prompt': 'a'}"), ("not JSON", "line 2, column 2")),
    "list in lines.jsonl": (lines(GOOD, [GOOD]), ("no object", "line 2: it is a list")),
    "number.json": (b"17", ("no object", "it is a number")),
    "null.json": (b"null", ("no object", "it is null")),
    "nested lists.json": (json.dumps([[GOOD]]).encode(), ("no object", "row 1: it is a list")),
    "bomb.json": (b"[" * 100_000, ("cannot be read", "nested too deeply")),
    "bomb.jsonl": (lines(GOOD) + b'\n{"prompt": ' + b"[" * 100_000, ("cannot be read", "line 2")),
    "huge number.jsonl": (b'{"a": 1' + b"0" * 5000 + b"}", ("cannot be read", "line 1: a number")),
    "empty.json": (b"", ("is empty", "empty.json")),
    "blank.jsonl": (b"\n \n\t\n", ("is empty", "blank.jsonl")),
    "only a mark.csv": (b"\xef\xbb\xbf", ("is empty", "only a mark.csv")),
    "only names.csv": (b"prompt,completion\n", ("is empty", "only names.csv")),
    "latin.jsonl": ('{"prompt": "a"}\n{"prompt": "\xe9"}'.encode("latin-1"), ("not UTF-8", "line 2: byte 0xe9")),
    "utf16.csv": ("prompt,completion\na,b".encode("utf-16"), ("not UTF-8", "UTF-16", "0xff")),
    "utf16 without mark.txt": ("some text".encode("utf-16-le"), ("not text", "line 1: byte 0x00")),
    "binary.txt": (bytes(range(256)) * 10, ("not", "line 1: byte 0x00")),
    "picture.json": (b"\x89PNG\r\n\x1a\n" + bytes(range(1, 256)), ("not UTF-8", "line 1: byte 0x89")),
    "archive.jsonl": (b"PK\x03\x04" + b"\x00" * 100, ("not UTF-8", "a ZIP archive")),
    "table.xlsx": (b"PK\x03\x04", ("type .xlsx", ".jsonl")),
    "open quote.csv": (b'prompt,completion\na,"b\nc,d\n', ("not CSV", "begins on line 2")),
    "fields.csv": (b"prompt,completion\na,b\nc,d, and e\n", ("too many fields", "line 3: 3 fields")),
    "short.csv": (b"prompt,completion\na,b\nc\n", ("1 of 2 rows", "`completion` is null (first: row 2)")),
    "two columns.csv": (b"prompt,completion,prompt\na,b,c\n", ("one name", "line 1", "'prompt' is there 2 times")),
    "two columns.parquet": (twice_named(), ("one name", "'prompt'")),
    "cut off.parquet": (parquet(prompt=["a"] * 999, completion=["b"] * 999)[:-20], ("not Parquet", "cut off.parquet")),
    "garbled.parquet": (
        (whole := parquet(prompt=[f"a{i}" for i in range(999)], completion=["b"] * 999))[:20]
        + bytes(200)
        + whole[220:],
        ("not Parquet", "garbled.parquet"),
    ),
    "nulls.jsonl": (
        lines(GOOD, {"prompt": None, "completion": "b"}), ("1 of 2 rows", "`prompt` is null (first: row 2)"),
    ),
    "nan.jsonl": (b'{"prompt": "a", "completion": NaN}', ("1 of 1 rows", "`completion` is null")),
    "no answers.jsonl": (
        lines({"prompt": "a", "completion": " "}), ("nothing to train on", "All 1 rows", "empty answer"),
    ),
    "mixed.jsonl": (
        lines({"messages": MESSAGES}, {"instruction": "a", "output": "b"}, GOOD),
        ("2 of 3 rows", "`messages` is null (first: row 2)"),
    ),
    "roles.jsonl": (
        lines({"messages": MESSAGES[::-1]}, {"messages": MESSAGES}, {"messages": [{"role": "bot", "content": "x"}]}),
        ("2 of 3 rows", "begins with an assistant turn", "the role 'bot'"),
    ),
    "sharegpt.json": (
        json.dumps([{"conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]}] * 2).encode(),
        ("2 of 2 rows", "the value of a message from human is null (first: row 1)"),
    ),
    "messages in messages.json": (
        json.dumps([{"messages": [MESSAGES]}]).encode(), ("1 of 1 rows", "something that is no message"),
    ),
    "call.json": (
        lines([{"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "f(x)"}]}]),
        ("1 of 1 rows", "a function call is no JSON object"),
    ),
    "tools.json": (
        json.dumps([{"messages": MESSAGES, "tools": "[{broken"}]).encode(), ("1 of 1 rows", "`tools` is no list"),
    ),
    "half a character.jsonl": (
        b'{"prompt": "a", "completion": "\\ud83d"}', ("1 of 1 rows", "half a character (U+D83D) (first: row 1)"),
    ),
    "unknown columns.jsonl": (lines({"name": "a", "age": 3}), ("not known", "`name`, `age`", "data.columns")),
    "pictures.jsonl": (lines({"messages": MESSAGES, "images": ["a.png"]}), ("1 of 1 rows", "it has images beside")),
    "preference.jsonl": (lines({"chosen": "a", "rejected": "b"}), ("1 of 1 rows", "no prompt beside `chosen`")),
}  # fmt: skip


@pytest.fixture
def frugal(tmp_path: Path):
    """Nothing is left behind, in bounded time; memory is looked at where it matters."""
    before = sorted(tmp_path.rglob("*"))
    start = time.process_time()
    yield
    assert time.process_time() - start < 5
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.name not in FILES] == []


def told(error: NbtuneError, *expected: str) -> None:
    """It has a title, says what and where, and what to do, in a few lines."""
    assert error.title
    assert error.remedy
    assert len(str(error)) < 1500
    for part in expected:
        assert part in str(error)


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path, frugal, name):
    content, expected = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(DataSpec(source=str(path)))
    told(caught.value, *expected)


def test_thirty_and_more():
    assert len(FILES) >= 40


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".txt"])
@pytest.mark.parametrize("broken", [True, False])
def test_a_line_of_two_hundred_megabytes(tmp_path, suffix, broken):
    path = tmp_path / f"long{suffix}"
    ends = {".csv": (b'prompt,completion\nQ,"', b'"\n'), ".txt": (b"", b"")}
    start, end = ends.get(suffix, (b'{"prompt": "Q", "completion": "', b'"}'))
    with path.open("wb") as file:
        file.write(start)
        for _ in range(200):
            file.write(b"x" * 1_000_000)
        file.write(b"\xff" if broken else end)
    began = time.process_time()
    with pytest.raises(DataError) as caught:
        read_rows(DataSpec(source=str(path)))
    assert time.process_time() - began < 20
    expected = (
        ("not UTF-8", "line", "byte 0xff") if broken else ("rows cannot be used", "more than 10,000,000 characters")
    )
    told(caught.value, *expected)
    if sys.platform == "linux":
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20  # KiB


def test_a_file_larger_than_the_memory(tmp_path):
    path = tmp_path / "sparse.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 42)  # takes no room on the disk
    with pytest.raises(DataError) as caught:
        read_rows(DataSpec(source=str(path)))
    told(caught.value, "does not fit into memory", "4398.0 GB")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("nowhere.jsonl", "not there"),
        ("\0", "not there"),
        ("x" * 300 + ".json", "no name"),
        ("a\nb", "no name"),
        ('{"prompt": "a"}' * 100, "no name"),
        ("~no-such-user-here/rows.json", "no name"),
        ("/dev/null", "not there"),
        ("memory:0123", "only in memory"),
    ],
)
def test_sources_that_are_none(tmp_path, source, expected):
    with pytest.raises(DataError) as caught:
        read_rows(DataSpec(source=source), base_dir=tmp_path)
    told(caught.value, expected)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: DataSpec.from_rows(pandas.DataFrame([[1, 2, 3]], columns=["a", "a", "b"])), "two columns 'a'"),
        (lambda: DataSpec.from_rows(["text"]), "data is a list"),
        (lambda: DataSpec.from_rows(3), "data is a int"),
        (lambda: RunSpec(data=np.zeros(3)), "data is a ndarray"),
        (lambda: from_text('[{"prompt": "a"'), "The pasted text, line 1, column 16"),
    ],
)
def test_objects_that_are_no_rows(make: Callable[[], Any], expected):
    with pytest.raises(ValueError, match=expected):
        make()


def deep() -> list[dict]:
    value: list = []
    for _ in range(100_000):
        value = [value]
    return [{"prompt": value}]


@pytest.mark.parametrize("rows", [deep(), [{"prompt": {1: "a", "b": "c"}}]], ids=["deep", "names of two kinds"])
def test_rows_that_cannot_be_written(rows):
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        DataSpec.from_rows(rows)


def test_frames_without_names_and_with_the_nulls_of_pandas():
    with pytest.raises(DataError) as caught:
        read_rows(RunSpec(data=pandas.DataFrame([["a", "b"]])).data)
    told(caught.value, "not known", "`0`, `1`")
    frame = pandas.DataFrame({"prompt": ["a", "b"], "completion": pandas.array([3, None], dtype="Int64")})
    with pytest.raises(DataError) as caught:
        read_rows(RunSpec(data=frame).data)
    told(caught.value, "1 of 2 rows", "`completion` is null (first: row 2)")
    pictures = [{"messages": MESSAGES, "images": np.zeros(3)}, {"messages": MESSAGES, "images": np.zeros(0)}]
    with pytest.raises(DataError) as caught:
        read_rows(DataSpec.from_rows(pictures))
    told(caught.value, "1 of 2 rows", "it has images")


def test_rows_of_a_frame_with_values_that_are_no_text():
    frame = pandas.DataFrame(
        {"prompt": ["a", None, "c"], "completion": [pandas.Timestamp("2026-01-01"), "x", b"bytes"]}
    )
    with pytest.raises(DataError) as caught:
        read_rows(RunSpec(data=frame).data)
    told(caught.value, "3 of 3 rows", "`completion` is a Timestamp, not text", "`prompt` is null", "a bytes, not text")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not come to an end"),
        ("{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "does not come to an end"),
        ("{{ 'x' * 9999999999 }}", "does not come to an end"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "does not come to an end"),
        ("{{ range(999999999) }}", "Range too big"),
        ("{% for message in messages %}", "not Jinja, line 1"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[9].content }}", "the template says"),
        ("{{ 'nothing' }}", "does not write what the assistant says"),
    ],
)
def test_templates(smollm_tokenizer, template, expected):
    from nbtune.data import check_template
    from nbtune.models import load_tokenizer
    from nbtune.spec import ModelSpec

    start = time.perf_counter()
    (finding,) = check_template(template, smollm_tokenizer)
    assert time.perf_counter() - start < 5
    assert finding.severity == "error"
    assert expected in f"{finding.title} {finding.message}"
    tokenizer = load_tokenizer(ModelSpec(chat_template=template))
    spec = DataSpec.from_rows([{"messages": MESSAGES}] * 3)
    with pytest.raises(DataError) as caught:
        report(spec, tokenizer, 64)
    told(caught.value, expected)
    with pytest.raises(DataError):
        load_examples(spec, tokenizer, 64)
