"""The comparison engine: one base model in memory, any number of adapters, all columns streamed together.

    engine = Engine(ModelSpec(), {"amber-heron": "runs/amber-heron/adapter"})
    question = [{"role": "user", "content": "What does os.path.join do?"}]
    for delta in engine.stream({"base": question, "amber-heron": question}):
        print(delta.column, delta.text)

Columns take turns, one token each. A turn sets the active adapter (two assignments, whatever the size of the model) and
runs the model on the column's own key-value cache, so that a column's text never depends on its neighbours.
"""

from __future__ import annotations

import dataclasses
import gc
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from nbtune._transformers import DynamicCache
from nbtune.errors import NbtuneError
from nbtune.infer.columns import BASE
from nbtune.infer.sampling import Sampler, Sampling, SamplingDefaults, default_sampling
from nbtune.infer.text import Message, TextStream, prompt_tokens, stop_tokens
from nbtune.models import load
from nbtune.peft import PeftModel
from nbtune.peft.config import PromptLearningConfig
from nbtune.spec import ModelSpec

Finish = Literal["end_of_turn", "max_new_tokens", "context", "stopped"]


@dataclasses.dataclass(frozen=True)
class Stats:
    """What one answer cost. Seconds are those spent on this column; turns of other columns are not counted."""

    prompt_tokens: int
    tokens: int = 0  # generated, the end of turn included
    first_token_seconds: float = 0.0  # reading the prompt and choosing the first token
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token; 0 before there is a second one."""
        after = self.seconds - self.first_token_seconds
        return (self.tokens - 1) / after if self.tokens > 1 and after > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Delta:
    """One turn of one column."""

    column: str
    text: str  # to append to what this column said before; may be empty
    stats: Stats
    finished: Finish | None = None  # set in the last delta of a column
    token: int | None = None  # None where a column was stopped before its turn


class Engine:
    """One base model and the columns that are compared on it: `"base"`, every adapter, every other whole model.

    adapters: name -> folder with `adapter_config.json`. models: name -> folder of a whole model with the tokenizer of
    the base (a full fine-tune), loaded beside it. Raises NbtuneError (ModelError, AdapterError) where one does not fit.
    """

    def __init__(
        self,
        model: ModelSpec,
        adapters: Mapping[str, str | Path] | None = None,
        *,
        models: Mapping[str, str | Path] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        adapters, models = adapters or {}, models or {}
        self.columns: tuple[str, ...] = (BASE, *adapters, *models)
        if len(set(self.columns)) < len(self.columns):
            raise NbtuneError("Two columns have the same name", ", ".join(self.columns), "Give each its own name.")
        self.spec = model
        loaded = load(model, device=device)
        self.tokenizer = loaded.tokenizer
        base = loaded.model.eval()
        self.device: torch.device = base.device
        self.dtype: torch.dtype = base.dtype
        self.defaults: SamplingDefaults = default_sampling(base.generation_config)
        self._config = base.config  # also that of the adapters and of every full fine-tune: one architecture
        self.context_length: int = self._config.get_text_config().max_position_embeddings
        self._stop_tokens = stop_tokens(self.tokenizer, base.generation_config)
        # Adapter names become module names, which may hold no dot; a column's name may.
        self._adapters = {name: f"column_{index}" for index, name in enumerate(adapters)}
        self._models: dict[str, Any] = {BASE: _with_adapters(base, self._adapters, adapters)}
        configs = {name: self._models[BASE].peft_config[inner] for name, inner in self._adapters.items()}
        prompts = {name: config for name, config in configs.items() if isinstance(config, PromptLearningConfig)}
        self._virtual_tokens = {name: config.num_virtual_tokens for name, config in prompts.items()}
        for name, folder in models.items():
            spec = model.model_copy(update={"name": str(folder), "revision": None})
            self._models[name] = load(spec, device=device).model.eval()
        self._keep_one_logit = "logits_to_keep" in inspect.signature(base.forward).parameters
        self._lock = threading.Lock()

    def stream(
        self,
        column_messages: Mapping[str, Sequence[Message]],
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int = 256,
        seed: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Delta]:
        """Answers of these columns, one token of each in turn; none sampling is `self.defaults`.

        Raises NbtuneError at once (not at the first `next`) for an unknown column, a conversation that the chat
        template refuses, or one that leaves no room for an answer. One stream runs at a time; others wait their turn.
        Closing the iterator, or `should_stop` returning True, ends it within one token.
        """
        if max_new_tokens < 1:
            raise NbtuneError("Nothing to generate", f"max_new_tokens is {max_new_tokens}.", "Ask for one or more.")
        sampling = sampling or self.defaults.sampling
        answers = [
            _Answer(self, column, self.prompt(column, messages), sampling, max_new_tokens, seed)
            for column, messages in column_messages.items()
        ]
        return self._take_turns(answers, should_stop)

    def prompt(self, column: str, messages: Sequence[Message]) -> list[int]:
        """The token ids that this column would read. Raises NbtuneError as `stream` does."""
        if column not in self.columns:
            raise NbtuneError(f"There is no column {column!r}", f"There are: {', '.join(self.columns)}.")
        ids = prompt_tokens(messages, self.tokenizer)
        room = self._room(column)
        if len(ids) >= room:
            raise NbtuneError(
                "The conversation is longer than the model's context",
                f"{column}: {len(ids):,} tokens; {self.spec.name} reads {room:,}, answer included.",
                "Shorten the prompt, or clear the conversation.",
            )
        return ids

    def _room(self, column: str) -> int:
        """How many tokens of text this column reads; a trained prompt before them takes some of the context."""
        return self.context_length - self._virtual_tokens.get(column, 0)

    def close(self) -> None:
        """Give the memory back. The engine cannot be used after."""
        with self._lock:
            self._models.clear()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _take_turns(self, answers: list[_Answer], should_stop: Callable[[], bool]) -> Iterator[Delta]:
        waiting = True
        while waiting and not should_stop():
            waiting = not self._lock.acquire(timeout=0.05)
        if waiting:
            yield from (answer.stopped() for answer in answers)
            return
        try:
            while answers:
                for answer in tuple(answers):
                    if should_stop():
                        yield from (left.stopped() for left in answers)
                        return
                    delta = answer.turn()
                    if delta.finished:
                        answers.remove(answer)
                    yield delta
        finally:
            self._lock.release()

    def _switch(self, column: str) -> Any:
        """The model that answers for this column, switched to its adapter."""
        model = self._models.get(column, self._models[BASE])
        if self._adapters and model is self._models[BASE]:
            # `disable_adapter` would walk the whole model to undo merges, of which there are none here.
            model.set_adapter([self._adapters[column]] if column in self._adapters else [])
        return model

    def _forward(self, column: str, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Logits of the next token, [1, V] in float32. ids: [1, T], what is not in the cache yet."""
        # Without this, reading a prompt of T tokens builds T x V logits to use one row of them.
        keep = {"logits_to_keep": 1} if self._keep_one_logit else {}
        model = self._switch(column)
        with torch.inference_mode():
            return model(input_ids=ids, past_key_values=cache, use_cache=True, **keep).logits[:, -1].float()


class _Answer:
    """One column's answer while it is written."""

    def __init__(
        self, engine: Engine, column: str, prompt: list[int], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> None:
        self.engine = engine
        self.column = column
        self.ids = torch.tensor([prompt], device=engine.device)  # [1, T]: the prompt and the answer so far
        self.unread = self.ids  # [1, U]: what is not in the cache yet
        self.cache = DynamicCache(config=engine._config)
        self.sampler = Sampler(sampling, seed, engine.device)
        self.text = TextStream(engine.tokenizer)
        self.stats = Stats(prompt_tokens=len(prompt))
        self.max_new_tokens = max_new_tokens

    def turn(self) -> Delta:
        """Choose one token."""
        start = time.perf_counter()
        logits = self.engine._forward(self.column, self.unread, self.cache)
        with torch.inference_mode():
            token = self.sampler(self.ids, logits)
            self.unread = torch.tensor([[token]], device=self.ids.device)
            self.ids = torch.cat([self.ids, self.unread], dim=1)
        self._count(time.perf_counter() - start)
        finished = self._finish(token)
        text = "" if finished == "end_of_turn" else self.text.add(token)
        if finished:
            text += self.text.rest()
        return Delta(self.column, text, self.stats, finished, token)

    def stopped(self) -> Delta:
        return Delta(self.column, self.text.rest(), self.stats, "stopped")

    def _count(self, seconds: float) -> None:
        first = self.stats.first_token_seconds or seconds
        self.stats = dataclasses.replace(
            self.stats,
            tokens=self.stats.tokens + 1,
            first_token_seconds=first,
            seconds=self.stats.seconds + seconds,
        )

    def _finish(self, token: int) -> Finish | None:
        if token in self.engine._stop_tokens:
            return "end_of_turn"
        if self.stats.tokens >= self.max_new_tokens:
            return "max_new_tokens"
        return "context" if self.ids.shape[1] >= self.engine._room(self.column) else None


def _with_adapters(base: Any, names: Mapping[str, str], folders: Mapping[str, str | Path]) -> Any:
    """The base, or a PeftModel over it that holds every adapter."""
    model = base
    for column, name in names.items():
        try:
            if model is base:
                model = PeftModel.from_pretrained(base, folders[column], adapter_name=name)
            else:
                model.load_adapter(folders[column], adapter_name=name)
        except NbtuneError as error:
            error.add_note(f"while loading column {column!r} from {folders[column]}")
            raise
    return model.eval()
