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
from nbtune.models.sandbox import require_bounded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = list[dict[str, Any]] | None

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

    def fitting(self, max_length: int, *, split: bool) -> list[Example]:
        """Examples of at most `max_length` tokens: the first of them, or, with `split`, all one after the other.

        Each part begins with the last token of the one before, so that every token is predicted once.
        """
        if not split or len(self) <= max_length:
            return [self.cut(max_length)]
        parts = [slice(start, start + max_length) for start in range(0, len(self) - 1, max_length - 1)]
        return [Example(self.input_ids[part].copy(), self.labels[part].copy()) for part in parts]


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
    templated = [place for place, chat in enumerate(chats) if not chat.raw]
    by_template = _render_chats([chats[p] for p in templated], tokenizer, [numbers[p] for p in templated])
    for chat in chats:
        yield [_render_plain(chat, tokenizer)] if chat.raw else next(by_template)


def _render_chats(
    chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, numbers: Sequence[int]
) -> Iterator[list[Rendered]]:
    if not chats:
        return
    renderer = _Renderer(tokenizer)
    chosen = [renderer.render(chat, number) for chat, number in zip(chats, numbers, strict=True)]
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
    """Applies one tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._template = tokenizer.get_chat_template()
        self._template_with_tools = tokenizer.get_chat_template(tools=[])  # some models have another one for them
        for template in (self._template, self._template_with_tools):
            require_bounded(template)
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        added = tokenizer.added_tokens_decoder.values()
        self._end_tokens = tuple(str(token) for token in added if str(token).strip())

    def render(self, chat: Chat, number: int) -> list[_Spans]:
        """Raises DataError naming the row, where the template cannot show it, and why."""
        try:
            return self._rendered(chat)
        except _Unrenderable as error:
            raise DataError(
                "The model's chat template cannot show a row",
                f"Row {number:,}: {error}.",
                "Mend or remove the row, or set another model.chat_template.",
            ) from error

    def _rendered(self, chat: Chat) -> list[_Spans]:
        template = self._template if chat.tools is None else self._template_with_tools
        _check_tools(chat, template)
        trained = _trained_turns(chat)
        # Nothing is learnt from what follows the last answer, and a template may rewrite answers because of it.
        messages = chat.messages[: trained[-1] + 1]

        def write(count: int, **how: bool) -> tuple[str, list[tuple[int, int]]]:
            return self._write(template, messages[:count], chat.tools, **how)

        if _GENERATION.search(template):
            text, marks = write(len(messages), marks=True)
            return [_Spans(text, _chosen_marks(marks, messages, trained))]
        return self._spans([(write(turn, prompt=True)[0], write(turn + 1)[0]) for turn in trained])

    def _write(
        self, template: str, messages: list[Message], tools: Tools, *, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a chat, and with `marks` the stretches in `{% generation %}`."""
        from transformers.utils.chat_template_utils import render_jinja_template

        with _template_errors():
            rendered: Any = render_jinja_template(
                [messages],  # pyright: ignore[reportArgumentType]
                tools=tools,  # pyright: ignore[reportArgumentType]
                chat_template=template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self._variables,
            )
        (text,), spans = rendered
        return text, spans[0] if marks else []

    def _spans(self, turns: Sequence[tuple[str, str]]) -> list[_Spans]:
        """From (prompt, prompt and answer) of each trained turn to one text, or to one for each turn."""
        for prompt, upto in turns:
            if not upto.startswith(prompt):
                raise _Unrenderable(
                    "the template does not begin an answer with its own generation prompt"
                    f" ({_tail(prompt)!r} became {_difference(prompt, upto)!r}), so where the answer begins is unclear;"
                    " a template with {% generation %} around the assistant's text would say"
                )
        if all(prompt == upto for prompt, upto in turns):
            raise _Unrenderable("the template does not write what the assistant says")
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


def _check_tools(chat: Chat, template: str) -> None:
    """Raise _Unrenderable where the template would leave out functions or calls without a word."""
    calls = any(message.get("tool_calls") for message in chat.messages)
    if calls and "tool_calls" not in template:
        raise _Unrenderable("the template does not write function calls (tool_calls); the standard chatml does")
    if chat.tools and not re.search(r"\btools\b", template):
        raise _Unrenderable("the template does not show the functions (tools); the standard chatml does")


@contextmanager
def _template_errors() -> Iterator[None]:
    """Turn what a template raises into the reason why a chat cannot be shown."""
    import jinja2

    try:
        yield
    except jinja2.TemplateSyntaxError as error:
        raise _Unrenderable(f"the template is not Jinja, line {error.lineno}: {error.message}") from error
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
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
        if not chat.plain and not chat.raw:
            raise DataError(
                "The model has no chat template",
                f"Row {number:,} is a chat, and this base model does not say how to write one as text.",
                "Choose an instruct model, set model.chat_template (to chatml, say), or give rows of `prompt` and"
                " `completion`, which are read as one text.",
            )


def _render_plain(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """A text, or a prompt and its completion as one, that ends with the end-of-text token."""
    *prompt, answer = (message["content"] for message in chat.messages)
    trained_from = sum(map(len, prompt))
    text = "".join([*prompt, answer])
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
