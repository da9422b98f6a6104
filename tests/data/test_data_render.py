"""The loss mask, held against an account of each template that was written by hand."""

from __future__ import annotations

import copy
import random
import time
from typing import Any

import numpy as np
import pytest
import templates

from nbtune.data import Chat, encode, encode_many
from nbtune.data.packing import IGNORED
from nbtune.errors import DataError

WORDS = "the cat, naïve 東京 🙂🙃  def f(x):\n\n    return x\n Ünder- <b> {{x}} \t 3.14 it's ... ok\r\n".split(" ")


def with_template(tokenizer: Any, template: str | None) -> Any:
    if template is None:
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": templates.SPECIAL_TOKENS})
    changed.chat_template = template
    return changed


@pytest.fixture(scope="module", params=templates.FAMILIES)
def family(request, smollm_tokenizer):
    template, account, system = templates.FAMILIES[request.param]
    return with_template(smollm_tokenizer, template), account, system


def brute_force(tokenizer: Any, pieces: list[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    """Token by token: it is trained if the character at which it begins is."""
    text = "".join(piece for piece, _ in pieces)
    trained = [flag for piece, flag in pieces for _ in piece]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    return ids, [
        token if trained[start] else IGNORED for token, (start, _) in zip(ids, encoded["offset_mapping"], strict=True)
    ]


def random_chat(draw: random.Random, system: bool) -> list[dict[str, str]]:
    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 12))) + draw.choice(["", "\n", " ", "."])

    messages = [{"role": "system", "content": text()}] if system and draw.random() < 0.5 else []
    for _ in range(draw.randint(1, 4)):
        messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
    return messages


def test_mask_equals_brute_force(family):
    tokenizer, account, system = family
    draw = random.Random(0)
    chats = [random_chat(draw, system) for _ in range(150)]
    for chat, examples in zip(chats, encode_many([Chat(chat) for chat in chats], tokenizer), strict=True):
        (example,) = examples
        ids, labels = brute_force(tokenizer, list(account(chat)))
        assert example.input_ids.tolist() == ids
        assert example.labels.tolist() == labels


def test_trained_text_is_answer_and_end_of_turn(smollm_tokenizer):
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two\n"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    (example,) = encode(chat, smollm_tokenizer)
    trained = example.labels[example.labels != IGNORED]
    assert smollm_tokenizer.decode(trained) == "two\n<|im_end|>four<|im_end|>"
    assert example.supervised == len(trained)
    assert example.labels[-1] == IGNORED  # the line break after <|im_end|>


def test_only_turns_after_the_context_are_trained(family):
    tokenizer, account, _ = family
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    (example,) = encode(Chat(chat, trained_from=2), tokenizer)
    pieces = list(account(chat))
    first = next(index for index, (_, trained) in enumerate(pieces) if trained)
    pieces[first] = (pieces[first][0], False)
    assert example.labels.tolist() == brute_force(tokenizer, pieces)[1]


def test_what_follows_the_last_answer_is_left_out(smollm_tokenizer):
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    (short,) = encode(chat, smollm_tokenizer)
    (long,) = encode([*chat, {"role": "user", "content": "thanks"}], smollm_tokenizer)
    assert np.array_equal(short.input_ids, long.input_ids)


def test_template_that_forgets_thinking_makes_an_example_of_each_turn(smollm_tokenizer):
    tokenizer = with_template(smollm_tokenizer, templates.FORGETFUL)
    chat = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\n2"},
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "<think>\nwell\n</think>\n\n4"},
    ]
    first, second = encode(chat, tokenizer)
    ids, labels = brute_force(tokenizer, list(templates.chatml(chat[:2])))
    assert (first.input_ids.tolist(), first.labels.tolist()) == (ids, labels)

    seen = [chat[0], {"role": "assistant", "content": "2"}, *chat[2:]]  # what the model sees when it answers again
    pieces = list(templates.chatml(seen))
    pieces[4] = (pieces[4][0], False)
    ids, labels = brute_force(tokenizer, pieces)
    assert (second.input_ids.tolist(), second.labels.tolist()) == (ids, labels)

    # A chat in which nothing is forgotten stays one example.
    assert len(encode([m | {"content": m["content"][-1]} for m in chat], tokenizer)) == 1


def test_template_with_an_unstable_generation_prompt(smollm_tokenizer):
    tokenizer = with_template(smollm_tokenizer, templates.UNSTABLE)
    with pytest.raises(DataError, match="generation prompt") as caught:
        encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tokenizer)
    assert "<think>" in caught.value.message
    assert "{% generation %}" in caught.value.message


def test_row_that_the_template_refuses_is_named(smollm_tokenizer):
    tokenizer = with_template(smollm_tokenizer, templates.GEMMA)
    good = Chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    bad = Chat([{"role": "user", "content": "a"}, {"role": "user", "content": "a"}, *good.messages[1:]])
    with pytest.raises(DataError, match="must alternate") as caught:
        list(encode_many([good] * 700 + [bad], tokenizer, range(1000, 1701)))
    assert "Row 1,700" in caught.value.message


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "user", "content": "a"}], "no assistant turn"),
        ([{"role": "assistant", "content": "a"}], "begins with an assistant turn"),
    ],
)
def test_chats_without_a_question_or_an_answer(smollm_tokenizer, messages, expected):
    with pytest.raises(DataError, match=expected):
        encode(messages, smollm_tokenizer)


def test_template_with_a_mistake(smollm_tokenizer):
    tokenizer = with_template(smollm_tokenizer, "{% for message in messages %}{{ message.nothing.more }}{% endfor %}")
    with pytest.raises(DataError, match="the template says"):
        encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tokenizer)


def test_model_without_template(smollm_tokenizer):
    tokenizer = copy.deepcopy(smollm_tokenizer)
    tokenizer.chat_template = None
    messages = [{"role": "user", "content": "The capital of France is"}, {"role": "assistant", "content": " Paris."}]
    (example,) = encode(Chat(messages, plain=True), tokenizer)
    assert tokenizer.decode(example.input_ids) == "The capital of France is Paris.<|im_end|>"
    assert tokenizer.decode(example.labels[example.labels != IGNORED]) == " Paris.<|im_end|>"
    with pytest.raises(DataError, match="no chat template") as caught:
        encode(messages, tokenizer)
    assert "instruct model" in caught.value.remedy


def test_cutting(smollm_tokenizer):
    (example,) = encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c d"}], smollm_tokenizer)
    assert example.cut(len(example)) is example
    short = example.cut(len(example) - 3)
    assert np.array_equal(short.labels, example.labels[:-3])
    assert short.supervised == example.supervised - 2  # the line break carried no loss


def test_thousands_of_rows_take_seconds(smollm_tokenizer):
    message = "word " * 60
    chat = Chat([{"role": "user", "content": message}, {"role": "assistant", "content": message}])
    start = time.process_time()
    assert sum(1 for _ in encode_many([chat] * 3000, smollm_tokenizer)) == 3000
    assert time.process_time() - start < 8
