"""Recipes: which rows each step drops and why, the same ones every time, and sources mixed by weight."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
from pydantic import ValidationError

from nbtune.data import load_examples, near, read_rows
from nbtune.data.report import report
from nbtune.errors import DataError
from nbtune.spec import DataSpec, RunSpec


def rows(count: int) -> list[dict]:
    return [{"prompt": f"Question {i}?", "completion": f"Answer {'x' * i}", "score": i} for i in range(count)]


def prepared(given: list[dict], *recipe: dict, **settings):
    return read_rows(DataSpec.from_rows(given, recipe=list(recipe), **{"eval_fraction": 0, **settings}))


def test_filter():
    found = prepared(rows(10), {"step": "filter", "where": "score >= 4 and len(completion) < 15"})
    assert found.train_numbers == [5, 6, 7, 8]
    assert found.dropped == {"filter: not score >= 4 and len(completion) < 15": 6}
    (step,) = found.steps
    assert (step.before, step.after, step.dropped) == (10, 4, [1, 2, 3, 4, 9, 10])
    assert step.examples == ["row 1", "row 2", "row 3", "row 4", "row 9"]


def test_filter_by_a_column_that_is_not_there_or_has_no_answer():
    with pytest.raises(DataError, match="no column 'scor'") as caught:
        prepared(rows(3), {"step": "filter", "where": "scor > 1"})
    assert "`score`" in caught.value.message
    with pytest.raises(DataError, match=r"Row 1:.*score < 'a'"):
        prepared(rows(3), {"step": "filter", "where": "score < 'a'"})


def test_filter_may_drop_what_could_not_be_used():
    given = [*rows(3), {"prompt": "Q", "completion": None, "score": 1}]
    assert len(prepared(given, {"step": "filter", "where": "completion is not None"}).train) == 3
    found = prepared(given, {"step": "usable"})
    assert found.train_numbers == [1, 2, 3]
    assert found.steps[0].examples == ["row 4: `completion` is null"]
    with pytest.raises(DataError, match="the step `usable`"):
        prepared(given)


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        ({"of": "answer", "at_least": 9}, [3, 4, 5, 6]),
        ({"of": "answer", "at_most": 9}, [1, 2, 3]),
        ({"of": "row", "unit": "words", "at_most": 4}, [1, 2, 3, 4, 5, 6]),
        ({"of": "question", "unit": "words", "at_least": 3}, None),
    ],
)
def test_length(step, kept):
    if kept is None:
        with pytest.raises(DataError, match="question of fewer than 3 words"):
            prepared(rows(6), {"step": "length", **step})
    else:
        assert prepared(rows(6), {"step": "length", **step}).train_numbers == kept


def test_length_in_tokens(smollm_tokenizer):
    given = [{"prompt": "Q", "completion": "word " * i} for i in range(1, 30)]
    step = {"step": "length", "unit": "tokens", "at_most": 50}
    spec = DataSpec.from_rows(given, recipe=[step], eval_fraction=0)
    with pytest.raises(DataError, match="tokenizer"):
        read_rows(spec)
    data = load_examples(spec, smollm_tokenizer, 512)
    everything = load_examples(DataSpec.from_rows(given, eval_fraction=0), smollm_tokenizer, 512)
    assert [len(e) for e in data.train] == [len(e) for e in everything.train if len(e) <= 50]
    assert 5 < len(data.train) < 29
    answers = {"step": "length", "of": "answer", "unit": "tokens", "at_most": 3}
    assert report(spec.model_copy(update={"recipe": []}), smollm_tokenizer, 512).kept == 29
    spec = DataSpec.from_rows(given, recipe=[answers], eval_fraction=0)
    assert len(load_examples(spec, smollm_tokenizer, 512).train) == 3


def test_exact_copies():
    given = [*rows(3), {"prompt": " question  1?", "completion": "ANSWER x\n"}, *rows(1)]
    found = prepared(given, {"step": "deduplicate"})
    assert found.train_numbers == [1, 2, 3]
    assert found.steps[0].examples == ["row 4 is the same as row 2", "row 5 is the same as row 1"]
    same_question = [{"prompt": "Q", "completion": text} for text in "abc"]
    assert prepared(same_question, {"step": "deduplicate", "of": "question"}).train_numbers == [1]


def changed(words: list[str], count: int, draw: random.Random) -> list[str]:
    copy = list(words)
    for place in draw.sample(range(len(copy)), count):
        copy[place] = f"other{draw.randrange(10**6)}"
    return copy


def test_near_copies_are_those_of_brute_force():
    draw = random.Random(0)
    texts: list[str] = []
    for _ in range(150):
        words = [f"w{draw.randrange(3000)}" for _ in range(60)]
        texts += [" ".join(changed(words, draw.randrange(0, 8), draw)) for _ in range(4)]
    draw.shuffle(texts)
    for similarity in (0.5, 0.8):
        kept: list[int] = []
        expected: list[bool] = []
        shingles = [near.runs(text, near.RUN) for text in texts]
        for place, one in enumerate(shingles):
            like = any(len(one & shingles[k]) / len(one | shingles[k]) >= similarity for k in kept)
            expected.append(like)
            if not like:
                kept.append(place)
        found = [place is not None for place in near.near_copies(texts, similarity)]
        assert 50 < sum(expected) < 550
        assert sum(a != b for a, b in zip(found, expected, strict=True)) <= 0.01 * len(texts)
        for place, earlier in enumerate(near.near_copies(texts, similarity)):
            if earlier is not None:  # what is dropped is near, always
                a, b = shingles[place], shingles[earlier]
                assert len(a & b) / len(a | b) >= similarity


def test_near_copies_of_rows_and_of_other_scripts():
    question = "Explain in simple words how a steam engine turns heat into motion"
    given = [
        {"prompt": question, "completion": "By steam."},
        {"prompt": question + ", please!", "completion": "By steam."},
        {"prompt": "蒸気機関が熱を運動に変える仕組みを説明して", "completion": "蒸気で。"},
        {"prompt": "蒸気機関が熱を運動に変える仕組みを説明し", "completion": "蒸気で。"},
        {"prompt": "Something else", "completion": "By steam."},
    ]
    found = prepared(given, {"step": "deduplicate", "similarity": 0.6})
    assert found.train_numbers == [1, 3, 5]
    assert found.steps[0].examples == ["row 2 is like row 1", "row 4 is like row 3"]


def test_near_copies_are_the_same_in_every_process():
    code = (
        "from nbtune.data import near; import random; d = random.Random(1)\n"
        "print(list(near.near_copies([' '.join(d.choices('abcd', k=9)) for _ in range(300)], 0.6)))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1
    assert "None" in outputs.pop()


def test_decontaminate():
    shared = "one two three four five six seven eight nine ten eleven twelve thirteen"
    given = [{"prompt": f"Question {i}?", "completion": f"Answer {a}"} for i in range(40) for a in "ab"]
    given += [{"prompt": f"{a} {shared} {a}", "completion": a} for a in "pqrstuvwxyz"]
    leaking = prepared(given, eval_fraction=0.3)
    found = prepared(given, {"step": "decontaminate"}, eval_fraction=0.3)
    assert found.eval_numbers == leaking.eval_numbers

    def questions(chats) -> set[str]:
        return {chat.messages[0]["content"] for chat in chats}

    assert questions(leaking.train) & questions(leaking.eval)
    assert not questions(found.train) & questions(found.eval)
    assert any(shared in text for text in questions(found.eval))
    assert not any(shared in text for text in questions(found.train))
    (step,) = found.steps
    assert step.label == "asks what is held out"
    assert step.before - step.after == len(step.dropped) == len(leaking.train) - len(found.train)
    assert any(example.endswith("its question is held out") for example in step.examples)


def test_decontaminate_against_another_file(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "QUESTION 3", "answer": "x"}))
    step = {"step": "decontaminate", "source": str(tmp_path / "test.jsonl")}
    found = prepared(rows(6), step)
    assert found.train_numbers == [1, 2, 3, 5, 6]
    assert found.steps[0].examples == ["row 4: its question is held out"]


def test_sample():
    found = prepared(rows(100), {"step": "sample", "rows": 10})
    assert len(found.train) == 10
    assert found.train_numbers == sorted(found.train_numbers)
    assert prepared(rows(100), {"step": "sample", "rows": 10}).train_numbers == found.train_numbers
    assert prepared(rows(100), {"step": "sample", "rows": 10, "seed": 1}).train_numbers != found.train_numbers
    assert len(prepared(rows(5), {"step": "sample", "rows": 10}).train) == 5


def test_steps_go_in_order_and_everything_is_accounted_for():
    recipe = [
        {"step": "filter", "where": "score > 9"},
        {"step": "deduplicate", "of": "answer"},
        {"step": "sample", "rows": 20},
        {"step": "decontaminate"},
    ]
    found = prepared(rows(50) * 2, *recipe, eval_fraction=0.1)
    assert [(step.before, step.after) for step in found.steps[:3]] == [(100, 80), (80, 40), (40, 20)]
    kept = [*found.train_numbers, *found.eval_numbers]
    gone = [number for numbers in found.left_out.values() for number in numbers]
    assert sorted(kept + gone) == list(range(1, 101))
    assert prepared(rows(50) * 2, *recipe, eval_fraction=0.1) == found


def test_nothing_left():
    with pytest.raises(DataError, match=r"All 3 rows of memory:\w+ were left out: filter: not score > 9 \(3\)"):
        prepared(rows(3), {"step": "filter", "where": "score > 9"})


def test_a_recipe_of_stdlib_docs():
    plain = read_rows(DataSpec())
    found = read_rows(DataSpec(recipe=[{"step": "filter", "where": "len(answer) > 200"}]))
    assert 100 < len(found.train) < len(plain.train)
    modules = [{found.raw[n - 1]["module"] for n in numbers} for numbers in (found.train_numbers, found.eval_numbers)]
    assert modules[1]
    assert not modules[0] & modules[1]


# Mixing


def test_mixing_by_weight(tmp_path):
    other = [{"instruction": f"Do {i}", "output": f"Done {i}"} for i in range(300)]
    (tmp_path / "other.json").write_text(json.dumps(other))
    (tmp_path / "third.jsonl").write_text("\n".join(json.dumps({"q": f"q{i}", "a": f"a{i}"}) for i in range(7)))
    spec = DataSpec.from_rows(
        rows(100),
        eval_fraction=0,
        mix=[
            {"source": "other.json", "weight": 0.5},
            {"source": "third.jsonl", "columns": {"prompt": "{q}!", "completion": "a"}},
        ],
    )
    found = read_rows(spec, base_dir=tmp_path)
    assert found.format == "prompt_completion"
    assert len(found.raw) == 407
    assert [sum(low < n <= high for n in found.train_numbers) for low, high in ((0, 100), (100, 400), (400, 407))] == [
        100, 50, 7,
    ]  # fmt: skip
    assert found.train[-1].messages[0]["content"] == "q6!"
    assert found.dropped == {"not drawn from other.json": 250}
    assert found.place(101) == "row 1 of other.json"
    assert found.place(407) == "row 7 of third.jsonl"
    assert read_rows(spec, base_dir=tmp_path) == found
    assert found.notes == []
    many = spec.model_copy(update={"mix": [spec.mix[0].model_copy(update={"weight": 4.0})]})
    found = read_rows(many, base_dir=tmp_path)
    assert len(found.train) == 400
    assert found.notes == ["other.json has 300 rows of the 400 that its weight asks for"]


def test_what_is_wrong_in_a_mixed_source_is_told_with_its_place(tmp_path):
    other = [*rows(8), {"prompt": "Q", "completion": " "}, {"prompt": "Q", "completion": None}]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, other)))
    spec = DataSpec.from_rows(rows(5), mix=[{"source": "other.jsonl"}], eval_fraction=0)
    with pytest.raises(DataError, match=r"1 of 15 rows(.|\n)*first: row 10 of other\.jsonl"):
        read_rows(spec, base_dir=tmp_path)
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, other[:-1])))
    few = DataSpec.from_rows(rows(5), mix=[{"source": "other.jsonl", "weight": 0.4}], eval_fraction=0)
    found = read_rows(few, base_dir=tmp_path)
    assert found.dropped == {"empty answer": 1, "not drawn from other.jsonl": 6}
    assert len(found.train) == 7


def test_mixing_stdlib_docs_in():
    found = read_rows(DataSpec.from_rows(rows(50), mix=[{"source": "stdlib-docs", "weight": 0.2}], eval_fraction=0))
    assert len(found.train) == 60
    assert found.place(51) == "row 1 of stdlib-docs"


# Part of the spec


def test_a_recipe_travels_with_the_spec(tmp_path):
    recipe = [
        {"step": "filter", "where": 'len(prompt) > 3 and "x" not in completion'},
        {"step": "length", "of": "answer", "unit": "tokens", "at_most": 10},
        {"step": "deduplicate", "similarity": 0.8},
        {"step": "decontaminate", "words": 8},
        {"step": "sample", "rows": 3, "seed": 2},
        {"step": "usable"},
    ]
    data = {
        "source": "a.jsonl", "recipe": recipe, "columns": {"prompt": "{q} {c}", "completion": "a"},
        "mix": [{"source": "b", "weight": 0.5}],
    }  # fmt: skip
    spec = RunSpec(data=data)
    (tmp_path / "spec.yaml").write_text(spec.to_yaml())
    assert RunSpec.from_yaml(tmp_path / "spec.yaml") == spec
    assert RunSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert RunSpec().updated(**{"data.recipe": recipe}).data.recipe == spec.data.recipe


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ({"step": "shuffle"}, "shuffle"),
        ({"step": "sample"}, "rows"),
        ({"step": "sample", "rows": 0}, "greater than or equal to 1"),
        ({"step": "length"}, "needs at_least or at_most"),
        ({"step": "length", "at_least": 5, "at_most": 4}, "more than at_most"),
        ({"step": "deduplicate", "similarity": 0}, "greater than 0"),
        ({"step": "usable", "why": 1}, "why"),
        ({}, "step"),
    ],
)
def test_steps_that_are_none(step, expected):
    with pytest.raises(ValidationError, match=expected):
        DataSpec(recipe=[step])
