"""From a spec to examples: the split, the limits, what is dropped, and the same tokens every time."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from nbtune.data import Batches, collate, load_examples, read_rows
from nbtune.data.dataset import CUT_AWAY
from nbtune.data.packing import IGNORED
from nbtune.errors import DataError
from nbtune.spec import DataSpec, RunSpec


def rows(count: int) -> list[dict]:
    return [{"prompt": f"Question {i}?", "completion": f"Answer {i}."} for i in range(count)]


def texts(chats) -> list[str]:
    return [chat.messages[0]["content"] for chat in chats]


def test_split_is_deterministic_and_follows_the_seed():
    first = read_rows(DataSpec.from_rows(rows(100), eval_fraction=0.1))
    assert (len(first.train), len(first.eval)) == (90, 10)
    assert first.format == "prompt_completion"
    assert read_rows(DataSpec.from_rows(rows(100), eval_fraction=0.1)) == first
    assert texts(read_rows(DataSpec.from_rows(rows(100), eval_fraction=0.1, seed=1)).eval) != texts(first.eval)
    assert [int(text.split()[1][:-1]) + 1 for text in texts(first.eval)] == first.eval_numbers
    assert texts(first.train) == sorted(texts(first.train), key=lambda text: int(text.split()[1][:-1]))


@pytest.mark.parametrize("seed", range(5))
def test_copies_of_a_row_are_on_one_side(seed):
    copies = rows(40) * 3 + [{"prompt": f" question  {i}?", "completion": f"ANSWER {i}.\n"} for i in range(40)]
    data = read_rows(DataSpec.from_rows(copies, eval_fraction=0.2, seed=seed))
    assert len(data.eval) == 4 * 8
    keys = [{text.strip().lower().replace("  ", " ") for text in texts(side)} for side in (data.train, data.eval)]
    assert not keys[0] & keys[1]


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"), [(1, 0.5, 0), (2, 0.01, 1), (2, 0.99, 1), (10, 0.0, 0), (10, 0.05, 1)]
)
def test_small_data(count, fraction, held_out):
    data = read_rows(DataSpec.from_rows(rows(count), eval_fraction=fraction))
    assert (len(data.train), len(data.eval)) == (count - held_out, held_out)


def test_missing_columns_in_some_rows():
    with pytest.raises(DataError, match="`completion` is missing") as caught:
        read_rows(DataSpec.from_rows([{"prompt": "x"}, *rows(3)]))
    assert "1 of 4" in caught.value.title


def test_no_rows():
    with pytest.raises(DataError, match="The data is empty"):
        read_rows(DataSpec.from_rows([]))
    with pytest.raises(DataError, match="All 1 rows"):
        read_rows(DataSpec.from_rows([{"prompt": "Q", "completion": " "}]))


def test_form_that_was_given():
    mixed = [{"instruction": "a", "output": "b", "prompt": "c", "completion": "d"}]
    assert texts(read_rows(DataSpec.from_rows(mixed)).train) == ["c"]
    assert texts(read_rows(DataSpec.from_rows(mixed, format="alpaca")).train) == ["a"]
    with pytest.raises(DataError, match="not in the form messages"):
        read_rows(DataSpec.from_rows(mixed, format="messages"))


def test_dataframe_and_dataset():
    import datasets
    import pandas

    expected = texts(read_rows(DataSpec.from_rows(rows(20))).train)
    for value in (pandas.DataFrame(rows(20)), datasets.Dataset.from_list(rows(20)), rows(20)):
        assert texts(read_rows(RunSpec(data=value).data).train) == expected
    frame = pandas.DataFrame({"instruction": ["a", "b"], "input": [None, "c"], "output": ["x", "y"]})
    assert read_rows(RunSpec(data=frame).data).format == "alpaca"


def test_limits_choose_spread_out_rows(smollm_tokenizer):
    spec = DataSpec.from_rows(rows(400), eval_fraction=0.5, max_rows=10, max_eval_rows=5)
    data = load_examples(spec, smollm_tokenizer, 128)
    assert (len(data.train), len(data.eval)) == (10, 5)
    numbers = [
        int(smollm_tokenizer.decode(example.input_ids).split("Question ")[1].split("?")[0]) for example in data.train
    ]
    assert numbers == sorted(numbers)
    assert numbers[0] < 40
    assert numbers[-1] > 320
    everything = load_examples(DataSpec.from_rows(rows(400), eval_fraction=0.5), smollm_tokenizer, 128)
    assert len(everything.train) == 200


def test_long_rows_are_cut_or_dropped(smollm_tokenizer):
    long_answer = {"prompt": "Q", "completion": "word " * 500}
    long_prompt = {"prompt": "word " * 500, "completion": "A"}
    spec = DataSpec.from_rows([*rows(5), long_answer, long_prompt], eval_fraction=0)
    data = load_examples(spec, smollm_tokenizer, 64)
    assert len(data.train) == 6
    assert max(len(example) for example in data.train) == 64
    assert data.dropped == {CUT_AWAY: 1}
    assert data.cut == 2
    with pytest.raises(DataError, match="max_length = 64"):
        load_examples(DataSpec.from_rows([long_prompt], eval_fraction=0), smollm_tokenizer, 64)


def test_messages_say_what_is_done(smollm_tokenizer):
    said: list[str] = []
    load_examples(DataSpec.from_rows(rows(3)), smollm_tokenizer, 64, on_status=said.append)
    assert said[-1] == "Tokenising 2 rows"


def test_fingerprint(smollm_tokenizer):
    spec = DataSpec.from_rows(rows(30))
    first = load_examples(spec, smollm_tokenizer, 128)
    assert first.fingerprint == load_examples(spec, smollm_tokenizer, 128).fingerprint
    assert len(first.fingerprint) == 64
    for other, length in [(spec, 38), (DataSpec.from_rows(rows(29)), 128), (DataSpec.from_rows(rows(30), seed=1), 128)]:
        assert load_examples(other, smollm_tokenizer, length).fingerprint != first.fingerprint


def test_stdlib_docs_from_end_to_end(smollm_tokenizer):
    data = load_examples(DataSpec(), smollm_tokenizer, 512)
    assert len(data.train) > 4000
    assert len(data.eval) == 128
    assert not data.dropped
    assert all(example.supervised >= 4 for example in data.train)
    batches = Batches(data.train, 2, 512)
    filled = data.train_tokens / (512 * sum(len(batch) for batch in batches.epoch(0)))
    assert filled > 0.97
    batch = collate([[data.train[index] for index in row] for row in batches.epoch(0)[0]])
    assert batch.tokens <= 1024
    assert smollm_tokenizer.decode(batch.labels[batch.labels != IGNORED]).endswith("<|im_end|>")


# Real files


@pytest.mark.sample_data
def test_alpaca_sample(samples, smollm_tokenizer):
    data = load_examples(DataSpec(source=str(samples / "alpaca_en_demo.json")), smollm_tokenizer, 512)
    assert data.format == "alpaca"
    assert len(data.train) + len(data.eval) + sum(data.dropped.values()) == 999
    raw = json.loads((samples / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    trained = Counter(
        smollm_tokenizer.decode(e.labels[e.labels != IGNORED]).removesuffix("<|im_end|>") for e in data.train
    )
    assert sum(trained[row["output"]] for row in raw) > 850  # all but those that were cut or held out
    batches = Batches(data.train, 2, 512)
    assert data.train_tokens / (512 * sum(len(batch) for batch in batches.epoch(0))) > 0.97


@pytest.mark.sample_data
def test_identity_sample(samples):
    assert len(read_rows(DataSpec(source=str(samples / "identity.json"), eval_fraction=0)).train) == 91


@pytest.mark.sample_data
@pytest.mark.parametrize(
    ("name", "form", "count", "reason"),
    [
        ("alpaca_en_demo.json", "alpaca", 999, "columns instruction, input, output"),
        ("identity.json", "alpaca", 91, "columns instruction, input, output"),
        ("glaive_toolcall_en_demo.json", "sharegpt", 300, "columns conversations, tools"),
        (
            "dpo_en_demo.json",
            "preference",
            299,
            "columns conversations, chosen, rejected; trained on the chosen",
        ),
        ("c4_demo.jsonl", "text", 300, "column text: every token is trained"),
        ("wiki_demo.txt", "text", 30, "column text: every token is trained"),
    ],
)
def test_samples_are_recognised(samples, name, form, count, reason):
    rows = read_rows(DataSpec(source=str(samples / name)))
    assert rows.format == form
    assert rows.form.reason.startswith(reason)
    assert len(rows.train) + len(rows.eval) + sum(rows.dropped.values()) == len(rows.raw) == count


@pytest.mark.sample_data
@pytest.mark.parametrize(
    ("name", "expected"),
    [("mllm_demo.json", "6 rows: it has images"), ("mllm_audio_demo.json", "3 rows: it has audios")],
)
def test_samples_with_media_are_refused(samples, name, expected):
    with pytest.raises(DataError, match=expected):
        read_rows(DataSpec(source=str(samples / name)))


@pytest.mark.sample_data
def test_samples_as_a_folder_are_of_several_forms(samples):
    with pytest.raises(DataError, match=r"alpaca_en_demo\.json is alpaca, .*c4_demo\.jsonl is text") as caught:
        read_rows(DataSpec(source=str(samples)))
    assert "data.mix" in caught.value.remedy
