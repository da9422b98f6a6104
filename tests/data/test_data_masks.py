"""The loss mask of a thousand rows, held against one derived by rendering each chat with and without each turn."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import templates

from nbtune.chat_templates import STANDARD, chat_template
from nbtune.data import Chat, check_template, encode_many, read_rows
from nbtune.data.packing import IGNORED
from nbtune.spec import DataSpec

ROWS = 1000
WORDS = "the cat, naïve 東京 🙂🙃 def f(x):\n\n    return x\n Ünder- <b> {{x}} \t 3.14 it's ... ok <|im_end| end".split(
    " "
)
TEMPLATES = {name: name for name in STANDARD} | {
    "marked": templates.MARKED, "plain": templates.PLAIN, "llama31": templates.LLAMA31_TOOLS,
    "mistral-tools": templates.MISTRAL_TOOLS,
}  # fmt: skip


def with_template(tokenizer: Any, name: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": [*templates.SPECIAL_TOKENS, "<|end|>", "[TOOL_CALLS]"]})
    changed.chat_template = chat_template(TEMPLATES[name])
    return changed


def masked(tokenizer: Any, chat: Chat) -> tuple[list[int], list[int]]:
    """Ids and labels by brute force: a letter is trained if it comes with an answer and not with its prompt."""

    def text(count: int, *, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            chat.messages[:count], tools=chat.tools, tokenize=False, add_generation_prompt=prompt
        )

    answers = [place for place, message in enumerate(chat.messages) if message["role"] == "assistant"]
    whole = text(answers[-1] + 1)
    trained = [False] * len(whole)
    for place in answers:
        if place < chat.trained_from:
            continue
        without, given, upto = text(place), text(place, prompt=True), text(place + 1)
        assert given.startswith(without)
        assert upto.startswith(given)
        assert whole.startswith(upto)
        end = len(upto.rstrip()) if upto.rstrip().endswith(tuple(tokenizer.all_special_tokens)) else len(upto)
        trained[len(given) : end] = [True] * (end - len(given))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    starts = [start for start, _ in encoded["offset_mapping"]]
    return ids, [token if trained[start] else IGNORED for token, start in zip(ids, starts, strict=True)]


def text(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, 10))) + draw.choice(["", "\n", " ", "."])


def call(draw: random.Random) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "look_up", "arguments": {"what": text(draw), "limit": None}}}


def chats(*, system: bool, tools: bool) -> Iterator[Chat]:
    draw = random.Random(7)
    functions = [{"type": "function", "function": {"name": "look_up", "description": "Ünder", "parameters": {}}}]
    for _ in range(ROWS):
        messages = [{"role": "system", "content": text(draw)}] if system and draw.random() < 0.5 else []
        for _ in range(draw.randint(1, 3)):
            messages.append({"role": "user", "content": text(draw)})
            if tools and draw.random() < 0.5:
                messages.append({"role": "assistant", "tool_calls": [call(draw)]})
                messages.append({"role": "tool", "content": json.dumps({"found": text(draw)})})
            messages.append({"role": "assistant", "content": text(draw)})
        yield Chat(
            messages,
            trained_from=draw.choice([0, 0, len(messages) - 1]),
            tools=functions if tools and draw.random() < 0.8 else None,
        )


def check(tokenizer: Any, found: list[Chat]) -> int:
    """The rows that were compared, all alike."""
    for chat, examples in zip(found, encode_many(found, tokenizer), strict=True):
        (example,) = examples
        ids, labels = masked(tokenizer, chat)
        assert example.input_ids.tolist() == ids
        assert example.labels.tolist() == labels
        assert example.supervised > 0
    return len(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_thousand_rows(smollm_tokenizer, name):
    tools = name in templates.WITH_TOOLS
    tokenizer = with_template(smollm_tokenizer, name)
    assert check(tokenizer, list(chats(system=name != "mistral-tools", tools=tools))) == ROWS


@pytest.mark.slow
@pytest.mark.sample_data
@pytest.mark.parametrize("name", TEMPLATES)
def test_real_rows(smollm_tokenizer, samples, name):
    files = ["alpaca_en_demo.json", "dpo_en_demo.json"]
    files += ["glaive_toolcall_en_demo.json"] if name in templates.WITH_TOOLS else []
    found = [chat for file in files for chat in read_rows(DataSpec(source=str(samples / file), eval_fraction=0)).train]
    assert check(with_template(smollm_tokenizer, name), found[-ROWS:]) == ROWS


@pytest.mark.parametrize("name", STANDARD)
def test_standard_templates_are_sound(smollm_tokenizer, name):
    tokenizer = with_template(smollm_tokenizer, name)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "Q2"},
        {"role": "assistant", "content": "A2"},
    ]
    found = [finding.title for finding in check_template(name, tokenizer, Chat(messages))]
    control = [title for title in found if "no token of this model" in title]
    assert found == control  # <|user|> and the like are words to SmolLM2, and that is said
    assert bool(control) == (name in ("phi3", "zephyr"))
