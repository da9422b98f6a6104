"""Chat templates of different families, each with a second, independent account of what it writes.

The account is a function from messages to pieces of (text, carries loss); joined they must be the rendered chat, and
the loss mask of `nbtune.data.render` must be theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Message = dict[str, Any]
Pieces = Iterator[tuple[str, bool]]

SMOLLM_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('There is no system role') }}{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)

GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

PLAIN = (  # nothing but the line break ends a turn
    "{% for message in messages %}{{ message['role'].capitalize() + ': ' + message['content'] | trim + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

FORGETFUL = (  # removes the thinking of every answer but the last, as Qwen3 does
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and not loop.last and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

UNSTABLE = (  # its generation prompt opens a thought that its answers do not have, as DeepSeek-R1's does
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)

LLAMA31_TOOLS = (  # functions before the first question, one call an answer, results as another role
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'ipython' if message['role'] == 'tool' else message['role'] %}"
    "{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}"
    "{% if tools and loop.first %}{% for tool in tools %}{{ tool | tojson(indent=4) + '\n\n' }}{% endfor %}{% endif %}"
    "{% if message['tool_calls'] %}{% set call = message['tool_calls'][0]['function'] %}"
    "{{ '{\"name\": \"' + call['name'] + '\", \"parameters\": ' + (call['arguments'] | tojson) + '}' }}"
    "{% else %}{{ message['content'] | trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

MISTRAL_TOOLS = (  # no generation prompt; calls and results in brackets
    "{{ bos_token }}{% if tools %}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'tool' %}"
    "{{ '[TOOL_RESULTS] ' + message['content'] + '[/TOOL_RESULTS]' }}{% elif message['role'] != 'assistant' %}"
    "{{ '[INST] ' + message['content'] + '[/INST]' }}{% elif message['tool_calls'] %}{{ '[TOOL_CALLS] [' }}"
    "{% for call in message['tool_calls'] %}{{ call['function'] | tojson }}{{ ', ' if not loop.last }}{% endfor %}"
    "{{ ']' + eos_token }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)

WITH_TOOLS = {"chatml": "chatml", "llama31": LLAMA31_TOOLS, "mistral-tools": MISTRAL_TOOLS}

SPECIAL_TOKENS = [
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]",
]  # fmt: skip


def smollm(messages: list[Message]) -> Pieces:
    if messages[0]["role"] != "system":
        yield f"<|im_start|>system\n{SMOLLM_SYSTEM}<|im_end|>\n", False
    yield from chatml(messages)


def chatml(messages: list[Message]) -> Pieces:
    for message in messages:
        yield f"<|im_start|>{message['role']}\n", False
        yield f"{message['content']}<|im_end|>", message["role"] == "assistant"
        yield "\n", False


def llama3(messages: list[Message]) -> Pieces:
    yield "<|im_start|>", False  # this tokenizer's bos
    for message in messages:
        yield f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", False
        yield f"{message['content'].strip()}<|eot_id|>", message["role"] == "assistant"


def mistral(messages: list[Message]) -> Pieces:
    yield "<|im_start|>", False
    for message in messages:
        if message["role"] == "user":
            yield f"[INST] {message['content']} [/INST]", False
        else:
            yield f" {message['content']}<|im_end|>", True


def gemma(messages: list[Message]) -> Pieces:
    yield "<|im_start|>", False
    for message in messages:
        role = "model" if message["role"] == "assistant" else message["role"]
        yield f"<start_of_turn>{role}\n", False
        yield f"{message['content'].strip()}<end_of_turn>", role == "model"
        yield "\n", False


def plain(messages: list[Message]) -> Pieces:
    for message in messages:
        trained = message["role"] == "assistant"
        yield f"{message['role'].capitalize()}:", False
        yield f" {message['content'].strip()}\n", trained


FAMILIES: dict[str, tuple[str | None, Callable[[list[Message]], Pieces], bool]] = {  # template, account, system allowed
    "smollm": (None, smollm, True),
    "chatml": (CHATML, chatml, True),
    "marked": (MARKED, chatml, True),
    "llama3": (LLAMA3, llama3, True),
    "mistral": (MISTRAL, mistral, False),
    "gemma": (GEMMA, gemma, False),
    "plain": (PLAIN, plain, True),
}
