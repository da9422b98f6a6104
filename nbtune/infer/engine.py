"""The comparison engine: one base model in memory, any number of adapters, all columns streamed together.

    engine = Engine(ModelSpec(), {"amber-heron": "runs/amber-heron/adapter"})
    question = [{"role": "user", "content": "What does os.path.join do?"}]
    for delta in engine.stream({"base": question, "amber-heron": question}):
        print(delta.column, delta.text)

Columns are the rows of one batch: one forward pass and one key-value cache write a token of each. Those that cannot
share a forward pass (another whole model, a trained prompt of another length) are batches of their own and take turns.
"""

from __future__ import annotations

import gc
import inspect
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nbtune._transformers import DynamicCache
from nbtune.errors import NbtuneError
from nbtune.infer.batch import Answer, Batch, Delta, Finish, Limits, Stats
from nbtune.infer.columns import BASE
from nbtune.infer.likelihood import Score, score
from nbtune.infer.sampling import Sampler, Sampling, SamplingDefaults, default_sampling
from nbtune.infer.text import Message, TextStream, prompt_tokens, stop_tokens
from nbtune.models import load
from nbtune.peft import PeftModel
from nbtune.peft.config import PromptLearningConfig
from nbtune.peft.layer import BASE as NO_ADAPTER
from nbtune.spec import ModelSpec

__all__ = ["Delta", "Engine", "Finish", "Score", "Stats"]


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
        self._prompts = prompts
        for name, folder in models.items():
            spec = model.model_copy(update={"name": str(folder), "revision": None})
            self._models[name] = load(spec, device=device).model.eval()
        self._stateful = bool(base._is_stateful)
        self._keeps_last_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
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
        """Answers of these columns, a token of each after the other; none sampling is `self.defaults`.

        Raises NbtuneError at once (not at the first `next`) for an unknown column, a conversation that the chat
        template refuses, or one that leaves no room for an answer. One stream runs at a time; others wait their turn.
        Closing the iterator, or `should_stop` returning True, ends it within one token.
        """
        sampling = sampling or self.defaults.sampling
        answers = [
            self.answer(column, messages, sampling, max_new_tokens=max_new_tokens, seed=seed)
            for column, messages in column_messages.items()
        ]
        return (delta for _, delta in self.write(answers, should_stop))

    def answer(
        self, column: str, messages: Sequence[Message], sampling: Sampling, *, max_new_tokens: int, seed: int
    ) -> Answer:
        """An answer that is to be written. Raises NbtuneError as `stream` does."""
        prompt = self.prompt(column, messages)
        return self.continuation(column, prompt, sampling, max_new_tokens=max_new_tokens, seed=seed)

    def continuation(
        self, column: str, prompt: Sequence[int], sampling: Sampling, *, max_new_tokens: int, seed: int
    ) -> Answer:
        """As `answer`, to token ids."""
        if max_new_tokens < 1:
            raise NbtuneError("Nothing to generate", f"max_new_tokens is {max_new_tokens}.", "Ask for one or more.")
        self._require_room(column, len(prompt))
        limits = Limits(self._stop_tokens, max_new_tokens, self.room(column))
        return Answer(column, list(prompt), Sampler(sampling, seed, self.device), TextStream(self.tokenizer), limits)

    def prompt(self, column: str, messages: Sequence[Message]) -> list[int]:
        """The token ids that this column would read. Raises NbtuneError as `stream` does."""
        self._require_room(column, 0)
        ids = prompt_tokens(messages, self.tokenizer)
        self._require_room(column, len(ids))
        return ids

    def score(self, column: str, prompt: Sequence[int], reference: Sequence[int]) -> Score:
        """How likely this column finds the tokens `reference` after the tokens `prompt`, at least one of each.

        Raises NbtuneError where there is none, the column is unknown, or both are longer than the context. Waits
        until nothing is written; a long reference is read in pieces, so that its logits never are in memory at once.
        """
        if not prompt or not reference:
            raise NbtuneError("There is nothing to score", f"{len(prompt)} and {len(reference)} tokens.")
        self._require_room(column, len(prompt) + len(reference) - 1)  # nothing follows the last
        ids = torch.tensor([[*prompt, *reference]], device=self.device)
        whole = column in self._prompts or self._stateful  # their caches take a text in one piece
        with self._lock:
            loss = score(partial(self._logits, [column]), ids, len(prompt), DynamicCache(config=self._config), whole)
        return Score(loss, len(reference))

    def _require_room(self, column: str, tokens: int) -> None:
        """Raise NbtuneError for an unknown column, or one that cannot read so many tokens and say the next."""
        if column not in self.columns:
            raise NbtuneError(f"There is no column {column!r}", f"There are: {', '.join(self.columns)}.")
        room = self.room(column)
        if tokens >= room:
            raise NbtuneError(
                "The conversation is longer than the model's context",
                f"{column}: {tokens:,} tokens; {self.spec.name} reads {room:,}, answer included.",
                "Shorten the prompt, or clear the conversation.",
            )

    def room(self, column: str) -> int:
        """How many tokens of text this column reads; a trained prompt before them takes some of the context."""
        config = self._prompts.get(column)
        return self.context_length - (config.num_virtual_tokens if config is not None else 0)

    def close(self) -> None:
        """Give the memory back. The engine cannot be used after."""
        with self._lock:
            self._models.clear()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def write(
        self, answers: Sequence[Answer], should_stop: Callable[[], bool] = lambda: False
    ) -> Generator[tuple[Answer, Delta], None, None]:
        """Each answer with its next token, a token of each after the other. Ends and waits as `stream` does."""
        waiting = True
        while waiting and not should_stop():
            waiting = not self._lock.acquire(timeout=0.05)
        if waiting:
            yield from ((answer, answer.stopped()) for answer in answers)
            return
        try:
            batches = self.batches(answers)
            while batches:
                for batch in batches:
                    for answer, delta in zip(tuple(batch.answers), batch.turn(), strict=True):
                        yield answer, delta
                        if should_stop():
                            yield from ((left, left.stopped()) for other in batches for left in other.answers)
                            return
                batches = [batch for batch in batches if batch.answers]
        finally:
            self._lock.release()

    def batches(self, answers: Iterable[Answer]) -> list[Batch]:
        """As few batches as can write these answers."""
        together: dict[Any, list[Answer]] = {}
        for answer in answers:
            together.setdefault(self.shares(answer.column), []).append(answer)
        return [
            Batch(
                self._forward,
                rows,
                DynamicCache(config=self._config),
                prompted=rows[0].column in self._prompts,
            )
            for rows in together.values()
        ]

    def shares(self, column: str) -> Any:
        """What two columns have in common where one forward pass can serve both."""
        whole = column in self._models and column != BASE
        if whole or self._stateful:  # padding would change a state
            return column
        config = self._prompts.get(column)
        return None if config is None else (type(config), config.num_virtual_tokens)

    def _forward(self, columns: list[str], **inputs: Any) -> torch.Tensor:
        """Logits of the next token of each row [B, V] in float32."""
        return self._logits(columns, 1, **inputs)[:, -1].float()

    def _logits(self, columns: list[str], last: int, **inputs: Any) -> torch.Tensor:
        """Logits after the last tokens of each row [B, last, V]."""
        # Without this, reading a prompt of T tokens builds T x V logits to use one row of them.
        keep: dict[str, Any] = {"logits_to_keep": last} if self._keeps_last_logits else {}
        with torch.inference_mode():
            model = self._models.get(columns[0], self._models[BASE])
            if model is self._models[BASE] and self._adapters:
                if len(set(columns)) == 1:
                    model.set_adapter([self._adapters[columns[0]]] if columns[0] in self._adapters else [])
                else:
                    keep["adapter_names"] = [self._adapters.get(column, NO_ADAPTER) for column in columns]
            return model(use_cache=True, **inputs, **keep).logits[:, -last:]


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
