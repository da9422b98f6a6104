from __future__ import annotations

import pytest

from nbtune.errors import NbtuneError
from nbtune.infer.text import TextStream, prompt_tokens, stop_tokens
from nbtune.models import load_tokenizer
from nbtune.spec import ModelSpec

TEXTS = [
    "plain words, and  two spaces\n\ttab",
    "naïve café — “quotes”",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 ✨",
    "नमस्ते",
    "\ufffd stays",
    "x" * 50,
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelSpec())


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_text_and_never_holds_half_a_character(tokenizer, text):
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    pieces.append(stream.rest())
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_is_shown_only_when_nothing_follows(tokenizer):
    tokens = tokenizer("a😀", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    assert "".join(stream.add(token) for token in tokens[:-1]) == "a"
    assert set(stream.rest()) == {"\ufffd"}


def test_special_tokens_are_never_text(tokenizer):
    stream = TextStream(tokenizer)
    tokens = tokenizer("<|im_start|>user\nhello<|im_end|>", add_special_tokens=False)["input_ids"]
    assert "".join(stream.add(token) for token in tokens) == "user\nhello"


def test_answers_stop_at_the_end_of_turn_and_at_the_end_of_text(tokenizer):
    from transformers import GenerationConfig

    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_tokens(tokenizer, GenerationConfig(eos_token_id=[0, 5])) == {0, 5, end}
    # A base model's tokenizer: end of text is another token than the template's end of turn.
    tokenizer = load_tokenizer(ModelSpec())
    tokenizer.eos_token = "<|endoftext|>"
    assert stop_tokens(tokenizer, GenerationConfig()) == {end, tokenizer.eos_token_id}


def test_a_template_that_refuses_is_a_clear_error(tokenizer):
    tokenizer = load_tokenizer(ModelSpec())
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(NbtuneError, match="System role not supported"):
        prompt_tokens([{"role": "system", "content": "be brief"}], tokenizer)
