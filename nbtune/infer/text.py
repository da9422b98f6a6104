"""Tokens to text while they arrive, and messages to tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from nbtune.chat_templates import chat_template
from nbtune.errors import NbtuneError
from nbtune.models.sandbox import require_bounded, written

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}; with pictures, `content` is a list of parts


class TextStream:
    """Text of the tokens so far. A character is given out once, whole, when all of its tokens are there.

    The whole answer is decoded each time and compared with what was given out: decoding token by token loses the
    spaces of SentencePiece vocabularies and breaks every character that spans tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.given = ""

    def add(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self.tokens.append(token)
        # A decoder writes U+FFFD for bytes that are no character yet. One that really is there comes out
        # with the next character after it, or in `rest`.
        return self._new(self._decode().rstrip("\ufffd"))

    def rest(self) -> str:
        """What is left when no token will follow."""
        return self._new(self._decode())

    def _decode(self) -> str:
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text if isinstance(text, str) else "".join(text)

    def _new(self, text: str) -> str:
        new = text[len(self.given) :]
        self.given += new
        return new


# What a template raises besides TemplateError: it adds a text to None, looks up what is not there, divides by zero.
_RAISED = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
_ANSWER = "nbtune-answer"
_TURN = ({"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER})


def prompt_tokens(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a chat, up to where the assistant's answer begins. Raises NbtuneError where the template refuses."""
    return token_ids(prompt_text(messages, tokenizer), tokenizer)


def prompt_text(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """As `prompt_tokens`, the text."""
    if tokenizer.chat_template is None:
        raise NbtuneError("The model has no chat template", "", "Choose one, such as chatml.")
    try:
        return _applied(tokenizer, messages, add_generation_prompt=True)
    except (TemplateError, *_RAISED) as error:
        raise NbtuneError(
            "The model's chat template refuses this conversation",
            str(error),
            "Some templates know no system prompt, or want user and assistant to alternate.",
        ) from error


def edited_text(
    template: str, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, config: GenerationConfig
) -> tuple[str, frozenset[int]]:
    """The prompt by a template that somebody typed, or a standard one's name; and the token ids that then stop.

    The template only ever runs in a process of its own, with little time and memory. Raises NbtuneError where it is no
    template, refuses the conversation, does not end or writes much too much.
    """
    try:
        template = chat_template(template)
    except ValueError as error:
        raise NbtuneError(
            "There is no such chat template", str(error), "Choose one of them, or write Jinja."
        ) from error
    known = {**tokenizer.special_tokens_map, "tools": None, "documents": None}
    asked = {**known, "messages": [dict(message) for message in messages], "add_generation_prompt": True}
    prompt, turn = written(template, [asked, {**known, "messages": _TURN, "add_generation_prompt": False}])
    if isinstance(prompt, NbtuneError):
        raise prompt
    after = frozenset() if isinstance(turn, NbtuneError) else _after_answer(turn, tokenizer)
    return prompt, _ends(tokenizer, config) | after


def stop_tokens(tokenizer: PreTrainedTokenizerBase, config: GenerationConfig) -> frozenset[int]:
    """Ids that end an answer: the model's end of text, and what the chat template writes after an assistant's turn.

    Raises DataError for a template that does not end.
    """
    ids = _ends(tokenizer, config)
    if tokenizer.chat_template is None:
        return ids
    require_bounded(tokenizer.get_chat_template())
    try:
        return ids | _after_answer(_applied(tokenizer, _TURN), tokenizer)
    except (TemplateError, *_RAISED):  # it is told where somebody asks
        return ids


def _applied(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    plain = [dict(message) for message in messages]
    return str(tokenizer.apply_chat_template(plain, add_generation_prompt=add_generation_prompt, tokenize=False))


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Of what a chat template has written."""
    # The template has written the special tokens already.
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]


def _ends(tokenizer: PreTrainedTokenizerBase, config: GenerationConfig) -> frozenset[int]:
    return frozenset(_as_list(config.eos_token_id)) | frozenset(_as_list(tokenizer.eos_token_id))


def _after_answer(text: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The token that `text`, which shows `_TURN`, goes on with after the answer."""
    _, shown, rest = text.rpartition(_ANSWER)
    after = token_ids(rest, tokenizer) if shown else []
    # A template without an end-of-turn token goes on with a newline or nothing: no reason to stop there.
    added = {token for token, text in tokenizer.added_tokens_decoder.items() if str(text).strip()}
    return frozenset(after[:1]) & frozenset(added.union(tokenizer.all_special_ids))


def _as_list(ids: Any) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
