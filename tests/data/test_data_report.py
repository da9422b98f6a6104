"""What the data step shows: every token with its kind, as training sees it, and every row that is left out."""

from __future__ import annotations

import json

import pytest

from nbtune.data import encode, load_examples, read_rows
from nbtune.data.dataset import CUT_AWAY
from nbtune.data.packing import IGNORED
from nbtune.data.report import Piece, report
from nbtune.errors import DataError
from nbtune.spec import DataSpec


def rows(count: int) -> list[dict]:
    return [{"prompt": f"Question {i}?", "completion": f"Answer 🙃 東京 {i}."} for i in range(count)]


def test_numbers_are_those_of_training(smollm_tokenizer):
    given = [*rows(30), {"prompt": "Q", "completion": " "}, {"prompt": "word " * 200, "completion": "A"}]
    spec = DataSpec.from_rows(given, eval_fraction=0.1, max_rows=20, max_eval_rows=2)
    found, said = None, []
    found = report(spec, smollm_tokenizer, 64, on_status=said.append)
    trained = load_examples(spec, smollm_tokenizer, 64)
    assert (found.form, found.reason) == ("prompt_completion", "columns prompt, completion")
    assert (found.total, found.train, found.held_out, found.kept) == (32, 20, 2, 22)
    assert found.dropped["empty answer"] == [31]
    assert found.raw(31) == given[30]
    assert found.longer == trained.cut == len(found.dropped.get(CUT_AWAY, []))
    examples = [*trained.train, *trained.eval]
    kept = [length for length in found.lengths.tolist() if length <= 64]
    assert kept == [len(example) for example in examples]
    assert found.columns == {"prompt": "Question 0?", "completion": "Answer 🙃 東京 0."}
    assert said[-1] == "Tokenising 22 rows"
    for number in (0, 33):
        with pytest.raises(IndexError, match="rows are 1 to 32"):
            found.raw(number)


def test_pieces_are_tokens_and_their_labels(smollm_tokenizer):
    spec = DataSpec.from_rows(rows(12), eval_fraction=0)
    found = report(spec, smollm_tokenizer, 64)
    chats = read_rows(spec).train
    for index, chat in enumerate(chats):
        (example,) = encode(chat, smollm_tokenizer)
        pieces = found.pieces(index)
        assert [piece.kind != "context" for piece in pieces] == (example.labels != IGNORED).tolist()
        text = smollm_tokenizer.apply_chat_template(chat.messages, tokenize=False)
        assert "".join(piece.text for piece in pieces) == text
    assert [piece for piece in pieces if piece.kind == "end"] == [Piece("<|im_end|>", "end")]
    assert "".join(piece.text for piece in pieces if piece.kind == "trained") == "Answer 🙃 東京 11."


def test_rows_that_training_would_refuse_are_listed(smollm_tokenizer):
    found = report(DataSpec.from_rows([*rows(3), {"prompt": "x"}]), smollm_tokenizer, 64)
    assert found.unusable == {"`completion` is missing": [4]}
    assert found.kept == 3
    assert isinstance(found.problem, DataError)
    assert found.problem.title == "1 of 4 rows cannot be used"
    assert report(DataSpec.from_rows(rows(3)), smollm_tokenizer, 64).problem is None


def test_stdlib_docs(smollm_tokenizer):
    found = report(DataSpec(max_rows=50, max_eval_rows=5), smollm_tokenizer, 512)
    assert (found.train, found.held_out) == (50, 5)
    assert len(found.lengths) == 55
    row = found.raw(int(found.numbers[7]))
    text = "".join(piece.text for piece in found.pieces(7))
    assert row["question"] in text
    assert text.endswith(row["answer"] + "<|im_end|>\n")


@pytest.mark.sample_data
def test_alpaca_sample(samples, smollm_tokenizer):
    found = report(DataSpec(source=str(samples / "alpaca_en_demo.json")), smollm_tokenizer, 256)
    raw = json.loads((samples / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    assert found.total == 999
    assert found.form == "alpaca"
    assert 0 < found.longer < 500
    assert found.raw(500) == raw[499]
    assert list(found.columns) == ["instruction", "input", "output"]
