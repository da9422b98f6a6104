"""What is good and bad about a chat template, for this tokenizer, before anything is trained with it."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from nbtune.chat_templates import STANDARD, chat_template
from nbtune.data import render
from nbtune.data.formats import Chat
from nbtune.data.packing import IGNORED
from nbtune.data.render import Rendered
from nbtune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CHECKS", "STANDARD", "Finding", "check_template"]

# What is looked at, in this order, and what is so where nothing is found.
CHECKS = {
    "renders": "writes the row",
    "stable": "earlier turns stay as they are",
    "shows": "shows what everybody says",
    "tokens": "its marks are tokens of the model",
    "round trip": "the tokens give back the text",
    "end": "an answer ends with a stop token",
}

_EXAMPLE = Chat(
    [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And of Japan?"},
        {"role": "assistant", "content": "Tokyo."},
    ]
)
# What templates write to part turns. A tokenizer that knows it has one token for it.
_CONTROL = re.compile(r"<\|[^<>|\s]+\|>|<(?:start|end)_of_turn>")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing about a template that is wrong (`error`: a run would fail) or unwise (`warning`)."""

    check: str  # of CHECKS
    title: str
    message: str = ""
    remedy: str = ""
    severity: Literal["error", "warning"] = "warning"


def check_template(template: str, tokenizer: PreTrainedTokenizerBase, chat: Chat | None = None) -> list[Finding]:
    """What is to be said of a standard template's name or a Jinja text, shown `chat`; nothing where it is fine.

    It is tried in a process of its own first, so one that never ends is found within seconds.
    """
    chat = chat or _EXAMPLE
    changed = copy.copy(tokenizer)
    try:
        changed.chat_template = chat_template(template)
        rendered = next(render.render_many([chat], changed))
    except DataError as error:
        return [Finding("renders", error.title, error.message.removeprefix("Row 1: "), error.remedy, "error")]
    except ValueError as error:
        return [Finding("renders", "There is no such chat template", str(error), "", "error")]
    last = rendered[-1]
    return [*_rewritten(rendered), *_unseen(last, chat), *_tokens(last, changed), *_end(last, changed)]


def _rewritten(rendered: list[Rendered]) -> Iterator[Finding]:
    if len(rendered) > 1:
        yield Finding(
            "stable",
            "The template writes earlier answers differently once the chat goes on",
            f"So this chat becomes {len(rendered)} examples, one for each answer, each as the model will read it then.",
        )


def _unseen(rendered: Rendered, chat: Chat) -> Iterator[Finding]:
    last = max(place for place, message in enumerate(chat.messages) if message["role"] == "assistant")
    asked = [message for message in chat.messages[:last] if message["role"] != "assistant"]
    for role in dict.fromkeys(message["role"] for message in asked):
        contents = [message["content"].strip() for message in asked if message["role"] == role]
        if not all(content in rendered.text for content in contents):
            yield Finding(
                "shows",
                f"The template does not show what the {role} says",
                "",
                "Write message['content'] for every role.",
            )


def _tokens(rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    ids = rendered.example.input_ids.tolist()
    decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if decoded != rendered.text:
        yield Finding(
            "round trip",
            "The tokens do not give back the text",
            "The tokenizer changes something that the template writes, often a blank at its beginning.",
            "Look at the preview: what is shown there is what is trained.",
        )
    for control in dict.fromkeys(_CONTROL.findall(rendered.text)):
        count = len(tokenizer(control, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]
        if count > 1:
            yield Finding(
                "tokens",
                f"{control} is no token of this model",
                f"It is read as {count} tokens, which the model has to learn.",
                "Choose a template whose tokens the model has.",
            )


def _end(rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    trained = rendered.example.labels[rendered.example.labels != IGNORED].tolist()
    if not trained or trained[-1] not in tokenizer.added_tokens_decoder:
        yield Finding(
            "end",
            "An answer does not end with a token at which generation stops",
            f"It ends with {tokenizer.decode(trained[-1:])!r}.",
            f"End it with {tokenizer.eos_token}: the standard zephyr and mistral do.",
        )
