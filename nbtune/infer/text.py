"""Tokens to text while they arrive, and messages to tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nbtune.errors import NbtuneError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}


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


def prompt_tokens(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a chat, up to where the assistant's answer begins. Raises NbtuneError where the template refuses."""
    import jinja2

    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
        )
    except jinja2.TemplateError as error:
        raise NbtuneError(
            "The model's chat template refuses this conversation",
            str(error),
            "Some templates know no system prompt, or want user and assistant to alternate.",
        ) from error
    # The template has written the special tokens already.
    return tokenizer(str(text), add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]


def stop_tokens(tokenizer: PreTrainedTokenizerBase, config: GenerationConfig) -> frozenset[int]:
    """Ids that end an answer: the model's end of text, and what the chat template writes after an assistant's turn."""
    ids = set(_as_list(config.eos_token_id)) | set(_as_list(tokenizer.eos_token_id))
    if tokenizer.chat_template is not None:
        answer = "nbtune-answer"
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        after = tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
        # A template without an end-of-turn token goes on with a newline or nothing: no reason to stop there.
        ids |= set(_as_list(after)[:1]) & set(tokenizer.all_special_ids)
    return frozenset(ids)


def _as_list(ids: Any) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
