"""Chats to tokens, with loss exactly on what the model has to say: its answers and the token that ends each of them.

The mask comes from the chat template, never from searching for strings. A template with `{% generation %}` says itself
which text is the assistant's. For any other, turn i spans from the end of the prompt that a chat would show before it,
`render(messages[:i], add_generation_prompt=True)`, to the end of `render(messages[:i + 1])`. Both must be prefixes of
the whole chat. Where they are not, because the template shows earlier answers differently once the chat goes on (it
removes their thinking, say), every turn becomes an example of its own: exactly what the model reads and writes then.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nbtune.data.formats import Chat, Message
from nbtune.data.packing import IGNORED
from nbtune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 512  # chats rendered and tokenised in one call
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Example:
    """One tokenised example; 8 bytes a token."""

    input_ids: npt.NDArray[np.int32]  # [T]
    labels: npt.NDArray[np.int32]  # [T], not shifted; IGNORED (-100) where no loss

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def supervised(self) -> int:
        """Tokens that carry loss; the first token never does, nothing comes before it."""
        return int(np.count_nonzero(self.labels[1:] != IGNORED))

    def cut(self, max_length: int) -> Example:
        """The first `max_length` tokens."""
        if len(self) <= max_length:
            return self
        return Example(self.input_ids[:max_length].copy(), self.labels[:max_length].copy())


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Rendered:
    """An example with the text that it was made of."""

    text: str
    offsets: npt.NDArray[np.int64]  # [T, 2], where each token begins and ends, in characters
    example: Example


class _Spans(NamedTuple):
    """A rendered text and the parts of it, in characters, that carry loss."""

    text: str
    spans: list[tuple[int, int]]


class _Unrenderable(Exception):  # noqa: N818 - reported with its row by the caller
    """Why the template cannot show a chat."""


def encode(messages: Sequence[Message] | Chat, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The examples of one chat: one, or one for each turn where the template rewrites earlier turns.

    Raises DataError where the model's template cannot show the chat.
    """
    chat = messages if isinstance(messages, Chat) else Chat(list(messages))
    return next(encode_many([chat], tokenizer))


def encode_many(
    chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, numbers: Sequence[int] | None = None
) -> Iterator[list[Example]]:
    """The examples of each chat, in order, uncut. `numbers` are the rows' numbers, for errors.

    Raises DataError where the tokenizer has no chat template and the chats need one, or where it cannot show them.
    """
    for rendered in render_many(chats, tokenizer, numbers):
        yield [one.example for one in rendered]


def render_many(
    chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, numbers: Sequence[int] | None = None
) -> Iterator[list[Rendered]]:
    """As `encode_many`, with the text of each example."""
    if not tokenizer.is_fast:
        raise DataError(
            "The model's tokenizer does not say where its tokens are",
            f"{type(tokenizer).__name__} is a slow tokenizer, without offsets.",
            "Choose a model with a tokenizer.json.",
        )
    numbers = range(1, len(chats) + 1) if numbers is None else numbers
    for start in range(0, len(chats), _CHUNK):
        part = slice(start, start + _CHUNK)
        yield from _render_chunk(chats[part], tokenizer, numbers[part])


def _render_chunk(
    chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, numbers: Sequence[int]
) -> Iterator[list[Rendered]]:
    if not tokenizer.chat_template:
        _check_plain(chats, numbers)
        yield from ([_render_plain(chat, tokenizer)] for chat in chats)
        return
    renderer = _Renderer(tokenizer)
    chosen = renderer.render_all(chats, numbers)
    texts = [spans.text for chat in chosen for spans in chat]
    encoded = tokenizer(
        texts,
        add_special_tokens=False,  # the template has written them
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,  # rows longer than the model's context are cut, there is nothing to warn of
    )
    position = 0
    for chat in chosen:
        rendered = []
        for spans in chat:
            ids, offsets = encoded["input_ids"][position], encoded["offset_mapping"][position]
            rendered.append(_rendered(spans, ids, offsets))
            position += 1
        yield rendered


def _rendered(spans: _Spans, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> Rendered:
    input_ids = np.array(ids, dtype=np.int32)
    places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = places[:, 0], places[:, 1]
    supervised = np.zeros(len(input_ids), dtype=bool)
    for start, end in spans.spans:
        # A token that begins before the answer belongs to the prompt: the model is given it.
        supervised |= (starts >= start) & (starts < end) & (ends > starts)
    return Rendered(spans.text, places, Example(input_ids, np.where(supervised, input_ids, np.int32(IGNORED))))


class _Renderer:
    """Applies one tokenizer's chat template, in batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._marks_answers = bool(_GENERATION.search(tokenizer.get_chat_template()))
        added = tokenizer.added_tokens_decoder.values()
        self._end_tokens = tuple(str(token) for token in added if str(token).strip())

    def render_all(self, chats: Sequence[Chat], numbers: Sequence[int]) -> list[list[_Spans]]:
        """Raises DataError naming the first row that the template cannot show, and why."""
        try:
            return self._render(chats)
        except _Unrenderable as error:
            if len(chats) > 1:  # find the row: one by one, the first that fails raises
                for chat, number in zip(chats, numbers, strict=True):
                    self.render_all([chat], [number])
            raise DataError(
                "The model's chat template cannot show a row",
                f"Row {numbers[0]:,}: {error}.",
                "Mend or remove the row, or choose a model whose template takes it.",
            ) from error

    def _render(self, chats: Sequence[Chat]) -> list[list[_Spans]]:
        turns = [_trained_turns(chat) for chat in chats]
        # Nothing is learnt from what follows the last answer, and a template may rewrite answers because of it.
        messages = [chat.messages[: trained[-1] + 1] for chat, trained in zip(chats, turns, strict=True)]
        if self._marks_answers:
            return self._marked(messages, turns)
        pairs = [(chat, turn) for chat, trained in zip(messages, turns, strict=True) for turn in trained]
        prompts = iter(self._apply([chat[:turn] for chat, turn in pairs], prompt=True))
        upto = iter(self._apply([chat[: turn + 1] for chat, turn in pairs]))
        return [self._spans([(next(prompts), next(upto)) for _ in trained]) for trained in turns]

    def _spans(self, turns: Sequence[tuple[str, str]]) -> list[_Spans]:
        """From (prompt, prompt and answer) of each trained turn to one text, or to one for each turn."""
        for prompt, upto in turns:
            if not upto.startswith(prompt):
                raise _Unrenderable(
                    "the template does not begin an answer with its own generation prompt"
                    f" ({_tail(prompt)!r} became {_difference(prompt, upto)!r}), so where the answer begins is unclear;"
                    " a template with {% generation %} around the assistant's text would say"
                )
        whole = turns[-1][1]
        spans = [(len(prompt), self._end(upto)) for prompt, upto in turns]
        if all(whole.startswith(upto) for _, upto in turns):
            return [_Spans(whole, spans)]
        return [_Spans(upto, [span]) for (_, upto), span in zip(turns, spans, strict=True)]

    def _end(self, upto: str) -> int:
        """Where the answer ends: after its end-of-turn token, before the white space that only separates turns.

        Without such a token the white space is all that ends the turn, and is kept.
        """
        text = upto.rstrip()
        return len(text) if text.endswith(self._end_tokens) else len(upto)

    def _marked(self, chats: list[list[Message]], turns: Sequence[Sequence[int]]) -> list[list[_Spans]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        tokenizer = self._tokenizer
        with _template_errors():
            rendered: Any = render_jinja_template(
                chats,
                chat_template=tokenizer.get_chat_template(),
                return_assistant_tokens_mask=True,
                **tokenizer.special_tokens_map,  # pyright: ignore[reportArgumentType] - variables of the template
            )
        texts, marks = rendered
        return [
            [_Spans(text, _chosen_marks(spans, chat, trained))]
            for text, spans, chat, trained in zip(texts, marks, chats, turns, strict=True)
        ]

    def _apply(self, chats: list[list[Message]], *, prompt: bool = False) -> list[str]:
        with _template_errors():
            return self._tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=prompt)  # pyright: ignore


@contextmanager
def _template_errors() -> Iterator[None]:
    """Turn what a template raises into the reason why a chat cannot be shown."""
    import jinja2

    try:
        yield
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise _Unrenderable(f"the template says: {error}") from error


def _chosen_marks(
    spans: Sequence[tuple[int, int]], chat: Sequence[Message], trained: Sequence[int]
) -> list[tuple[int, int]]:
    """The stretches that `{% generation %}` marks, without those of the turns that are context only."""
    answers = [index for index, message in enumerate(chat) if message["role"] == "assistant"]
    if not spans:
        raise _Unrenderable("the template marks no answer with {% generation %}")
    if answers == list(trained):
        return list(spans)
    if len(spans) != len(answers):
        raise _Unrenderable(
            f"the template marks {len(spans)} answers with {{% generation %}}, there are {len(answers)}"
        )
    return [span for span, turn in zip(spans, answers, strict=True) if turn in trained]


def _trained_turns(chat: Chat) -> list[int]:
    turns = [
        index
        for index, message in enumerate(chat.messages)
        if index >= chat.trained_from and message["role"] == "assistant"
    ]
    if not turns:
        raise _Unrenderable("the chat has no assistant turn to learn")
    if turns[0] == 0:
        raise _Unrenderable("the chat begins with an assistant turn; nothing was asked")
    return turns


def _check_plain(chats: Sequence[Chat], numbers: Sequence[int]) -> None:
    for chat, number in zip(chats, numbers, strict=True):
        if not chat.plain:
            raise DataError(
                "The model has no chat template",
                f"Row {number:,} is a chat, and this base model does not say how to write one as text.",
                "Choose an instruct model, or give rows of `prompt` and `completion`, which are read as one text.",
            )


def _render_plain(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """A prompt and its completion as one text that ends with the end-of-text token."""
    prompt, completion = (message["content"] for message in chat.messages)
    return _as_text(prompt + completion, len(prompt), tokenizer)


def _as_text(text: str, trained_from: int, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Text without a template, trained from a character on, and the end-of-text token after it."""
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    if ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers add it themselves
        del ids[-1], offsets[-1]
    whole = text + str(tokenizer.eos_token)
    ids.append(tokenizer.eos_token_id)
    offsets.append((len(text), len(whole)))
    return _rendered(_Spans(whole, [(trained_from, len(whole))]), ids, offsets)


def _tail(text: str) -> str:
    return text[-30:]


def _difference(prompt: str, upto: str) -> str:
    """The stretch of `upto` around the place where it leaves `prompt`."""
    same = next((i for i, (a, b) in enumerate(zip(prompt, upto, strict=False)) if a != b), min(len(prompt), len(upto)))
    return upto[max(0, same - 15) : same + 15]
