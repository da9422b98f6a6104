"""Samples: what the model in training answers to a few questions, at each evaluation, beside what the data answers.

A question is a held-out row up to its first answer, in the very tokens of the evaluation, or one of a person's own as
the model's chat template shows it. Answers are greedy, so that they change only because the model does.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import torch

from nbtune._transformers import PreTrainedModel
from nbtune.data import Example
from nbtune.data.packing import IGNORED
from nbtune.infer.text import prompt_tokens, stop_tokens
from nbtune.modules.base import evaluating
from nbtune.peft import PeftModel
from nbtune.spec import TrainingSpec
from nbtune.train.events import Event

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS = 48
MAX_SECONDS = 5.0  # of one evaluation; answers that are not ready by then are cut (4-bit weights are slow on a CPU)
PLAIN_TOKENS = 16  # of a text without questions, that are given as one
SHOWN_CHARACTERS = 600  # of a question and of an answer, in the event
_MARK = "nbtune-question"


@dataclasses.dataclass(frozen=True)
class Question:
    """The tokens up to where an answer begins, and how a person reads it."""

    ids: list[int]
    text: str
    reference: str = ""  # what the data answers; none to a question of one's own


def questions(
    training: TrainingSpec, held_out: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> list[Question]:
    """The person's own, and `training.eval_samples` evenly spread held-out ones."""
    own = [Question(_prompt(text, tokenizer), _short(text)) for text in training.sample_prompts or ()]
    count = min(training.eval_samples, len(held_out))
    frame = _frame(tokenizer) if count else None
    return own + [_of_row(held_out[index * len(held_out) // count], tokenizer, frame) for index in range(count)]


class Sampler:
    """Asks the model in training; the model is as it was afterwards, and no random number is drawn.

    Args:
        model: The model, set to nbtune's packed attention.
        adapted: The same model with its adapter; None where every weight is trained.
        asked: The questions, answered together in one batch.
        tokenizer: The model's.
        should_stop: Asked before every token.
        first_says: Asks a question; where several processes generate in step, they must all stop at the same token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapted: PeftModel | None,
        asked: Sequence[Question],
        tokenizer: PreTrainedTokenizerBase,
        should_stop: Callable[[], bool],
        first_says: Callable[[Callable[[], bool]], bool] = lambda ask: ask(),
    ) -> None:
        self._model, self._adapted = model, adapted
        self._questions = asked
        self._tokenizer = tokenizer
        self._should_stop = should_stop
        self._first_says = first_says
        self._stop_tokens = sorted(stop_tokens(tokenizer, model.generation_config))

    @torch.no_grad()
    def samples(self) -> list[dict[str, str]]:
        """`prompt`, `answer` and `reference` of each question; none where there are no questions, or asked to stop."""
        if not self._questions:
            return []
        longest = max(len(question.ids) for question in self._questions)
        ids = torch.zeros(len(self._questions), longest, dtype=torch.int64, device=self._model.device)  # [B, T]
        mask = torch.zeros_like(ids)
        for row, question in enumerate(self._questions):  # an answer begins at the end of its row
            ids[row, -len(question.ids) :] = torch.tensor(question.ids)
            mask[row, -len(question.ids) :] = 1
        with evaluating(self._model), _reading_the_cache(self._model):
            generated = self._generate(ids, mask)[:, longest:]
        if self._first_says(self._should_stop):
            return []
        answers = self._tokenizer.batch_decode(generated, skip_special_tokens=True)
        return [
            {"prompt": question.text, "answer": _short(answer), "reference": question.reference}
            for question, answer in zip(self._questions, answers, strict=True)
        ]

    def _generate(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        from transformers import GenerationConfig

        until = time.monotonic() + MAX_SECONDS

        def stop(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            over = self._first_says(lambda: self._should_stop() or time.monotonic() > until)
            return torch.full((len(ids),), over, device=ids.device)

        settings = GenerationConfig(
            max_new_tokens=MAX_NEW_TOKENS, do_sample=False, temperature=1.0, top_p=1.0, top_k=50, use_cache=True,
            eos_token_id=self._stop_tokens or None, pad_token_id=self._stop_tokens[0] if self._stop_tokens else 0,
        )  # fmt: skip
        generator: Any = self._adapted if self._adapted is not None else self._model
        return generator.generate(
            input_ids=ids, attention_mask=mask, generation_config=settings, stopping_criteria=[stop]
        )


def report_samples(sampler: Sampler, step: int, on_event: Callable[[Event], None]) -> None:
    """Report what the model answers. That it cannot, is no reason to end the training."""
    began = time.perf_counter()
    try:
        samples = sampler.samples()
    except Exception as error:  # noqa: BLE001 - see above; the warning says it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        on_event({"type": "warning", "message": f"There are no samples at step {step}: {reason}"})
        return
    if samples:
        on_event({"type": "samples", "step": step, "samples": samples, "seconds": time.perf_counter() - began})


@contextmanager
def _reading_the_cache(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `model` attends to a cache of keys and values; packed attention knows none."""
    packed = str(model.config._attn_implementation)
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(packed)


def _prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if tokenizer.chat_template is None:
        return list(tokenizer(text)["input_ids"])
    return prompt_tokens([{"role": "user", "content": text}], tokenizer)


def _of_row(example: Example, tokenizer: PreTrainedTokenizerBase, frame: tuple[str, str] | None) -> Question:
    """The row up to its first answer; a row that is all text, up to its PLAIN_TOKENS."""
    labelled = example.labels != IGNORED  # [T]
    start = int(labelled.argmax()) or max(1, min(PLAIN_TOKENS, len(example) // 2))
    after = np.flatnonzero(~labelled[start:])
    end = start + int(after[0]) if len(after) else len(example)
    ids = example.input_ids.tolist()
    reference = str(tokenizer.decode(ids[start:end], skip_special_tokens=True))
    return Question(ids[:start], _short(_question(ids[:start], tokenizer, frame)), _short(reference))


def _question(ids: list[int], tokenizer: PreTrainedTokenizerBase, frame: tuple[str, str] | None) -> str:
    """What the person said: the text without what the template writes around a lone question."""
    text = str(tokenizer.decode(ids))
    if frame is not None and text.startswith(frame[0]) and text.endswith(frame[1]):
        return text[len(frame[0]) : len(text) - len(frame[1])]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """What the template writes before and after a lone question; None where it shows none alone, or is not there."""
    if tokenizer.chat_template is None:
        return None
    try:
        text = str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": _MARK}], add_generation_prompt=True, tokenize=False
            )
        )
    except jinja2.TemplateError:
        return None
    before, mark, after = text.partition(_MARK)
    return (before, after) if mark else None


def _short(text: str) -> str:
    text = text.strip()
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
