"""Files of every kind, whole and broken, and datasets that are not there."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import pytest

from nbtune.data import hub, sources
from nbtune.errors import DataError
from nbtune.spec import DataSpec

ROWS = [
    {"prompt": 'Say "hé", 東京;', "completion": "line one\nline two\u2028still it"},
    {"prompt": "x", "completion": "y"},
]


def write(path: Path, rows: list[dict] = ROWS) -> Path:
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        case ".jsonl":
            path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
        case ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def read(source: str | Path, base_dir: Path | None = None, **settings) -> list[dict]:
    return sources.read(DataSpec(source=str(source), **settings), base_dir, lambda message: None)


def refused(source: str | Path, base_dir: Path | None = None) -> DataError:
    with pytest.raises(DataError) as caught:
        read(source, base_dir)
    return caught.value


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet", ".JSONL"])
def test_files(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix.lower()}").rename(tmp_path / f"rows{suffix}")
    assert read(path) == ROWS
    assert read(path.name, base_dir=tmp_path) == ROWS


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_byte_order_mark(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(path) == ROWS


def test_windows_line_ends(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read(path) == ROWS


def test_json_with_the_rows_under_a_name(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    assert read(tmp_path / "a.json") == ROWS


def test_json_lines_named_json(tmp_path):
    write(tmp_path / "a.jsonl").rename(tmp_path / "a.json")
    assert read(tmp_path / "a.json") == ROWS


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters(tmp_path, delimiter):
    (tmp_path / "a.csv").write_text(delimiter.join(["prompt", "completion"]) + "\n" + delimiter.join(["x, z", "y"]))
    assert read(tmp_path / "a.csv") == [{"prompt": "x, z", "completion": "y"}]


@pytest.mark.parametrize("end", ["\r\n", "\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_of_csv(tmp_path, end, last):
    (tmp_path / "a.csv").write_bytes(f'prompt,completion{end}"a\u2028{end}b",c{end}{end}d,e{end * last}'.encode())
    first = "a\u2028\nb" if end == "\r" else f"a\u2028{end}b"
    assert read(tmp_path / "a.csv") == [{"prompt": first, "completion": "c"}, {"prompt": "d", "completion": "e"}]


def test_long_csv_field(tmp_path):
    rows = [{"prompt": "x" * 300_000, "completion": "y"}]
    assert read(write(tmp_path / "a.csv", rows)) == rows


def test_nested_parquet(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}]
    assert read(write(tmp_path / "a.parquet", rows)) == rows


def test_rows_in_memory():
    spec = DataSpec.from_rows(ROWS)
    assert sources.read(spec, None, print) == ROWS
    with pytest.raises(DataError, match="existed only in memory"):
        sources.read(DataSpec(source=spec.source), None, print)


# Broken


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_broken_json_line(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "c", "completion": }\n')
    error = refused(path)
    assert error.title == "The data is not JSON"
    assert f"{path}, line 3, column 31" in error.message


def test_broken_json_list(tmp_path):
    (tmp_path / "a.json").write_text('[\n{"a": 1},\n{"a": 2\n]')
    assert "line 4" in refused(tmp_path / "a.json").message


@pytest.mark.parametrize(("name", "content"), [("a.json", "[1]"), ("a.json", "3"), ("a.jsonl", '{"a": 1}\n[2]')])
def test_rows_that_are_no_objects(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert "no object" in refused(tmp_path / name).title


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *[(name, content) for name in ("a.json", "a.jsonl", "a.csv") for content in ("", "\n \n")],
        ("a.json", "[]"),
        ("a.json", '{"data": []}'),
        ("a.csv", "prompt,completion\n"),
    ],
)
def test_empty_files(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    error = refused(tmp_path / name)
    assert error.title == "The data is empty"
    assert str(tmp_path / name) in error.message


def test_empty_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    assert refused(tmp_path / "a.parquet").title == "The data is empty"


def test_other_encodings(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"prompt": "a"}\n{"prompt": "é"}'.encode("latin-1"))
    error = refused(tmp_path / "a.jsonl")
    assert "line 2" in error.message
    assert "0xe9" in error.message
    (tmp_path / "b.jsonl").write_bytes('{"prompt": "é"}'.encode("utf-16"))
    assert "not UTF-8" in refused(tmp_path / "b.jsonl").title


def test_csv_with_too_many_fields(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\nc,d, and e\n")
    error = refused(tmp_path / "a.csv")
    assert "line 3: 3 fields" in error.message
    assert "double quotes" in error.remedy


def test_csv_with_an_open_quote(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completion\na,"b\n')
    assert "not CSV" in refused(tmp_path / "a.csv").title


def test_broken_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    assert "not Parquet" in refused(tmp_path / "a.parquet").title


def test_other_types(tmp_path):
    (tmp_path / "a.xlsx").write_text("hello")
    error = refused(tmp_path / "a.xlsx")
    assert "type .xlsx" in error.title
    assert ".jsonl" in error.remedy


# Prose, folders and pasted texts


@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_paragraphs_and_lines_of_a_text(tmp_path, name):
    path = tmp_path / name
    path.write_text("one\ntwo\n\n \nthree\n", encoding="utf-8")
    assert read(path) == [{"text": "one\ntwo\n\nthree"}]
    paragraphs = ["x" * 1500, "y" * 499, "z" * 100]  # with the blank line between them 2,001
    path.write_bytes("\r\n\r\n".join(paragraphs).encode())
    assert [row["text"] for row in read(path)] == [paragraphs[0], "\n\n".join(paragraphs[1:])]
    path.write_text("x" * 3000 + "\n" + "y" * 10, encoding="utf-8")
    assert [len(row["text"]) for row in read(path)] == [3000, 10]


def test_folder(tmp_path):
    write(tmp_path / "b.csv")
    write(tmp_path / "a.jsonl", ROWS[:1])
    (tmp_path / "README.md").write_text("not a row")
    (tmp_path / ".hidden.json").write_text("broken")
    assert read(tmp_path) == [*ROWS[:1], *ROWS]
    (tmp_path / "c.json").write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    error = refused(tmp_path)
    assert "not of one form" in error.title
    assert f"{tmp_path / 'c.json'} is alpaca" in error.message


def test_folder_of_texts_and_folder_without_data(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.md").write_text("one")
    assert read(tmp_path) == [{"text": "one"}, {"text": "two"}]
    (tmp_path / "empty").mkdir()
    assert "holds no data" in refused(tmp_path / "empty").title


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (json.dumps(ROWS), ROWS),
        ("\ufeff\n" + "\n".join(map(json.dumps, ROWS)), ROWS),
        ("prompt,completion\na,b\n", [{"prompt": "a", "completion": "b"}]),
        ("prompt\tcompletion\na, z\tb", [{"prompt": "a, z", "completion": "b"}]),
        ("Well, that was it.\n\nOr was it?", [{"text": "Well, that was it.\n\nOr was it?"}]),
        ("Well, then.\nA, b, c.", [{"text": "Well, then.\nA, b, c."}]),
    ],
)
def test_pasted_text(text, rows):
    assert list(sources.from_text(text, eval_fraction=0).rows) == rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", "empty"), (" \n", "empty"), ("[]", "empty"), ('{"a": 1', "not JSON"), ("[1, 2]", "no object")],
)
def test_pasted_text_that_is_no_data(text, expected):
    with pytest.raises(DataError, match=expected):
        sources.from_text(text)


# Not there


def test_missing_file_names_the_near_ones(tmp_path):
    write(tmp_path / "alpaca.json")
    error = refused("alpacca.json", base_dir=tmp_path)
    assert str(tmp_path / "alpacca.json") in error.message
    assert error.remedy == "Did you mean alpaca.json?"


def test_misspelt_built_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "stdlib-docs" in refused("stdlib_docs").remedy


@pytest.fixture
def reachable(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def test_hub_without_network(reachable):
    start = time.perf_counter()
    error = refused("someone/some-data")
    assert time.perf_counter() - start < 10  # importing `datasets` included
    assert "cannot be reached" in error.title
    assert "stdlib-docs" in error.remedy


def test_hub_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused("someone/some-data").message


def test_hub_dataset(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(hub, "_look_up", lambda name: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("someone/data", split="test") == ROWS
    assert asked == [("someone/data", "test")]


def test_hub_dataset_with_an_unknown_split(monkeypatch):
    import datasets

    def load_dataset(name: str, split: str) -> None:
        raise ValueError(f"Unknown split \"{split}\". Should be one of ['train'].")

    monkeypatch.setattr(hub, "_look_up", lambda name: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "Unknown split" in refused("someone/data").message


def test_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl")

    def deny(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", deny)
    assert "Permission denied" in refused(path).message
