"""Rows of every form to chats, and what is said of rows that are of none."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nbtune.data import formats
from nbtune.errors import DataError

USER = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "A"}


def chat(row: dict, form: str | None = None) -> formats.Chat:
    found = formats.check_columns(form, row) if form else formats.detect(row)
    return formats.convert({7: row}, found).chats[7]


def refused(*rows: dict, form: str = "messages") -> DataError:
    unusable = formats.convert(dict(enumerate(rows, 1)), formats.Form(form, "", {})).unusable
    assert unusable
    return formats.unusable_error(unusable, len(rows), "file.jsonl")


@pytest.mark.parametrize(
    ("columns", "form"),
    [
        (["instruction", "input", "output"], "alpaca"),
        (["output", "instruction", "id"], "alpaca"),
        (["prompt", "completion"], "prompt_completion"),
        (["messages", "prompt", "completion"], "messages"),
    ],
)
def test_detection(columns, form):
    assert formats.detect(columns).name == form


@pytest.mark.parametrize("columns", [["name", "age"], ["chosen", "prompt"], []])
def test_unknown_columns_are_named(columns):
    with pytest.raises(DataError) as caught:
        formats.detect(columns)
    assert all(f"`{name}`" in caught.value.message for name in columns)
    assert "alpaca (instruction, input, output)" in caught.value.message
    assert "data.columns" in caught.value.remedy


def test_given_form_that_the_columns_do_not_have():
    with pytest.raises(DataError, match="`completion` is missing") as caught:
        formats.check_columns("prompt_completion", ["prompt", "response"])
    assert "`response`" in caught.value.message


@pytest.mark.parametrize("extra", ["", None, float("nan")])
def test_alpaca(extra):
    assert chat({"instruction": "Q", "input": extra, "output": "A"}).messages == [USER, ANSWER]


def test_alpaca_with_input_and_system():
    row = {"instruction": "Add.", "input": "1 2", "output": 3, "system": "Be brief."}
    assert chat(row).messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add.\n\n1 2"},
        {"role": "assistant", "content": "3"},
    ]


def test_prompt_completion():
    made = chat({"prompt": "Q", "completion": "A"})
    assert made.messages == [USER, ANSWER]
    assert made.plain


def test_prompt_completion_of_messages_trains_the_completion_only():
    made = chat({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert made.messages == [USER, ANSWER, USER, ANSWER]
    assert made.trained_from == 3
    assert not made.plain


@pytest.mark.parametrize(
    "value", [[USER, ANSWER], (USER, ANSWER), json.dumps([USER, ANSWER]), np.array([USER, ANSWER])]
)
def test_messages(value):
    assert chat({"messages": value}).messages == [USER, ANSWER]


def test_messages_keep_what_templates_use_and_drop_nulls():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    made = chat({"messages": [USER | {"name": None}, call, {"role": "tool", "content": "1"}, ANSWER]})
    assert made.messages[0] == USER
    assert "content" not in made.messages[1]
    assert made.messages[1]["tool_calls"]


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat({"messages": [USER | {"content": parts}, ANSWER]}).messages[0]["content"] == "ab"


@pytest.mark.parametrize(
    ("row", "form", "expected"),
    [
        ({"messages": None}, "messages", "`messages` is null"),
        ({"messages": []}, "messages", "`messages` is empty"),
        ({"messages": "hello"}, "messages", "`messages` is no list"),
        ({"messages": [USER]}, "messages", "no assistant turn"),
        ({"messages": ["hello"]}, "messages", "is no message"),
        ({"messages": [{"content": "x"}]}, "messages", "without a role"),
        ({"messages": [{"role": "human", "content": "x"}, ANSWER]}, "messages", "the role 'human'"),
        (
            {"messages": [{"role": "user", "content": None}, ANSWER]},
            "messages",
            "content of a message of the user is null",
        ),
        ({"messages": [{"role": "user", "content": 5}, ANSWER]}, "messages", "a number, not text"),
        ({"messages": [USER | {"content": [{"type": "image"}]}, ANSWER]}, "messages", "images"),
        ({"messages": [USER, ANSWER], "images": ["a.jpg"]}, "messages", "images beside"),
        ({"prompt": "Q", "completion": None}, "prompt_completion", "`completion` is null"),
        ({"prompt": "Q"}, "prompt_completion", "`completion` is missing"),
        ({"prompt": "Q", "completion": {"a": 1}}, "prompt_completion", "an object, not text"),
        ({"prompt": [USER], "completion": "A"}, "prompt_completion", "the other a list"),
        ({"prompt": [USER], "completion": [USER]}, "prompt_completion", "no assistant turn"),
        ({"instruction": "", "input": " ", "output": "A"}, "alpaca", "are empty"),
        ({"instruction": "Q", "output": True}, "alpaca", "true or false, not text"),
        ({"instruction": "Q", "output": float("nan")}, "alpaca", "`output` is null"),
    ],
)
def test_unusable_rows(row, form, expected):
    error = refused(row, form=form)
    assert expected in error.message
    assert "first: row 1" in error.message
    assert "file.jsonl" in error.message
    assert error.remedy


def test_all_reasons_are_counted_with_their_first_row():
    good = {"messages": [USER, ANSWER]}
    silent = {"messages": [USER]}
    error = refused(good, silent, {"messages": None}, good, silent)
    assert error.title == "3 of 5 rows cannot be used"
    assert "2 rows: no assistant turn, so nothing to learn (first: row 2)" in error.message
    assert "1 row: `messages` is null (first: row 3)" in error.message


def test_many_reasons_are_not_all_listed():
    error = refused(*({"messages": [{"role": f"r{i}", "content": "x"}]} for i in range(9)))
    assert "and 4 more reasons" in error.message


def test_empty_answers_are_dropped_and_counted():
    rows = [{"prompt": "Q", "completion": text} for text in ("", "A", "  \n")]
    converted = formats.convert(dict(enumerate(rows, 1)), formats.Form("prompt_completion", "", {}))
    assert list(converted.chats) == [2]
    assert converted.left_out == {"empty answer": [1, 3]}


# ShareGPT, functions, preference pairs, text

CALL = {"name": "area", "arguments": {"shape": "circle", "radius": None}}
CALLED = {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}
TOOL = {"name": "area", "description": "Area of a shape", "parameters": {"type": "object"}}
HUMAN = {"from": "human", "value": "Q"}
GPT = {"from": "gpt", "value": "A"}


def test_sharegpt_with_functions():
    conversations = [
        HUMAN,
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": '{"area": 3}'},
        GPT,
    ]
    made = chat({"conversations": conversations, "tools": json.dumps([TOOL]), "system": "Be brief."})
    assert made.messages == [
        {"role": "system", "content": "Be brief."},
        USER,
        CALLED,
        {"role": "tool", "content": '{"area": 3}'},
        ANSWER,
    ]
    assert made.tools == [{"type": "function", "function": TOOL}]
    for nothing in ("[]", "", None, []):
        assert chat({"conversations": [HUMAN, GPT], "tools": nothing}).tools is None


def test_functions_as_openai_writes_them():
    call = {"id": "1", "type": "function", "function": CALL | {"arguments": json.dumps(CALL["arguments"])}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, ANSWER]
    made = chat({"messages": messages, "tools": [{"type": "function", "function": TOOL | {"strict": None}}]})
    assert made.messages[1] == {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": CALL}]}
    assert made.tools == [{"type": "function", "function": TOOL}]
    several = {"from": "function_call", "value": json.dumps([CALL, CALL])}
    assert len(chat({"conversations": [HUMAN, several, GPT]}).messages[1]["tool_calls"]) == 2


@pytest.mark.parametrize(
    ("row", "trained_from", "length"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, 1, 2),
        ({"question": "Q", "chosen": "A", "rejected": "B"}, 1, 2),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, 1, 2),
        ({"prompt": "Q", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "B"}]}, 1, 2),
        ({"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, ANSWER, USER, ANSWER | {"content": "B"}]}, 3, 4),
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": GPT}, 1, 2),
        ({"system": "S", "prompt": "Q", "chosen": ANSWER, "rejected": ANSWER}, 2, 3),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, 1, 2),
    ],
)
def test_preference_pairs_train_the_chosen_answer(row, trained_from, length):
    made = chat(row)
    assert made.trained_from == trained_from
    assert len(made.messages) == length
    assert made.messages[-2:] == [USER, ANSWER]
    assert "trained on the chosen answers" in formats.detect(row).reason


def test_text():
    made = chat({"text": "Once upon a time", "id": 3})
    assert made.raw
    assert made.messages[0]["content"] == "Once upon a time"
    assert formats.detect(["id", "text"]).reason == "column text: every token is trained"
    assert formats.convert({1: {"text": " "}}, formats.detect(["text"])).left_out == {"empty answer": [1]}
