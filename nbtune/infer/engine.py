"""The comparison engine: base models, any number of adapters on each, all columns streamed together.

    engine = Engine(ModelSpec(), {"amber-heron": "runs/amber-heron/adapter"})
    question = [{"role": "user", "content": "What does os.path.join do?"}]
    for delta in engine.stream({"base": question, "amber-heron": question}):
        print(delta.column, delta.text)

Columns of one model are the rows of one batch: one forward pass and one key-value cache write a token of each. Those
that cannot share a forward pass (another model, a trained prompt of another length) are batches of their own and take
turns; models that do not fit into memory together answer one after the other.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nbtune._transformers import DynamicCache
from nbtune.errors import NbtuneError
from nbtune.infer.base import Base, Memory, Prompt
from nbtune.infer.batch import Answer, Batch, Delta, Finish, Limits, Stats
from nbtune.infer.columns import BASE, Family
from nbtune.infer.likelihood import Score, score
from nbtune.infer.mix import Mix
from nbtune.infer.sampling import Sampler, Sampling, SamplingDefaults
from nbtune.infer.text import Message, TextStream
from nbtune.models import available_memory, default_device
from nbtune.models.source import OnStatus, ignore_status
from nbtune.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nbtune.infer.columns import Lineup
    from nbtune.infer.pictures import PictureReader

__all__ = ["BUDGET", "Delta", "Engine", "Finish", "Score", "Stats"]

BUDGET = 0.8  # of the memory that is free when the engine is made: what the weights of all models may take
MIXES = 1000  # combinations of adapters that are known by name; how many are kept as weights is in base.py


class Engine:
    """The columns that are compared: `"base"`, every adapter, every other model, and the adapters of those.

    Args:
        model: The base.
        adapters: Of the base: column -> folder with `adapter_config.json`.
        models: Whole models beside it (full fine-tunes): column -> folder, with a tokenizer of its own.
        others: Other base models, each with its adapters.
        device: Where all of them compute.
        memory_budget: Bytes that the weights of all models may take together, adapters included. Those that do not fit
            are loaded in turn, the one least recently asked dropped. None is `BUDGET` of what is free.
        on_status: Is told what is being loaded.

    Raises NbtuneError (ModelError, AdapterError) where something cannot be read, or does not fit even alone.
    """

    def __init__(
        self,
        model: ModelSpec,
        adapters: Mapping[str, str | Path] | None = None,
        *,
        models: Mapping[str, str | Path] | None = None,
        others: Sequence[Family] = (),
        device: str | torch.device | None = None,
        memory_budget: int | None = None,
        on_status: OnStatus = ignore_status,
    ) -> None:
        whole = [
            Family(name, model.model_copy(update={"name": str(folder), "revision": None}), {})
            for name, folder in (models or {}).items()
        ]
        families = [Family(BASE, model, dict(adapters or {})), *whole, *others]
        names = [(family.name, *family.adapters) for family in families]
        self.columns: tuple[str, ...] = tuple(itertools.chain(*names))
        if len(set(self.columns)) < len(self.columns):
            raise NbtuneError("Two columns have the same name", ", ".join(self.columns), "Give each its own name.")
        self.spec = model
        self.device = default_device() if device is None else torch.device(device)
        budget = int(BUDGET * available_memory(self.device)) if memory_budget is None else memory_budget
        self.memory = Memory(budget, on_status)
        self._bases: dict[str, Base] = {}  # by column
        for family, columns in zip(families, names, strict=True):
            base = Base(family.model, family.adapters, device=self.device, on_status=on_status)
            self.memory.check(base)
            self._bases |= dict.fromkeys(columns, base)
        bases = list(dict.fromkeys(self._bases.values()))
        for base in bases:
            if base.can_pack and self.memory.fits([*bases, base]):
                base.pack()
        self._mixes: dict[str, Mix] = {}
        self._lock = threading.Lock()
        self.memory.bring(self._bases[BASE])

    @classmethod
    def of(cls, lineup: Lineup, **settings: Any) -> Engine:
        """The engine of what `line_up` has found; settings are those of `Engine`."""
        return cls(lineup.model, lineup.adapters, models=lineup.models, others=lineup.others, **settings)

    def base_of(self, column: str) -> Base:
        """The model that a column is made of: its tokenizer, sampling defaults, context, chat template.

        Raises NbtuneError where there is no such column.
        """
        mix = self._mixes.get(column)
        if mix is not None:
            column = next(iter(mix.weights))
        if column not in self._bases:
            raise NbtuneError(f"There is no column {column!r}", f"There are: {', '.join(self.columns)}.")
        return self._bases[column]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the first base, as are the properties below; `base_of` has those of each column."""
        return self._bases[BASE].tokenizer

    @property
    def pictures(self) -> PictureReader | None:
        """What reads pictures; none where the model takes text only."""
        return self._bases[BASE].pictures

    @property
    def defaults(self) -> SamplingDefaults:
        return self._bases[BASE].defaults

    @property
    def context_length(self) -> int:
        return self._bases[BASE].context_length

    @property
    def dtype(self) -> torch.dtype:
        return self._bases[BASE].dtype

    @property
    def chat_template(self) -> str | None:
        """The model's own text; `chat_template_source` says where it comes from."""
        return self._bases[BASE].chat_template

    @property
    def chat_template_source(self) -> str:
        return self._bases[BASE].chat_template_source

    def stream(
        self,
        column_messages: Mapping[str, Sequence[Message]],
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int = 256,
        seed: int = 0,
        chat_template: str | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Delta]:
        """Answers of these columns, a token of each after the other; none sampling is what each column starts with.

        `chat_template` is a Jinja text, or the name of a standard one, in place of each model's own. Raises NbtuneError
        at once (not at the first `next`) for an unknown column, a conversation that the chat template refuses, or one
        that leaves no room for an answer. One stream runs at a time; others wait their turn. Closing the iterator, or
        `should_stop` returning True, ends it within one token.
        """
        how: Any = {"max_new_tokens": max_new_tokens, "seed": seed, "chat_template": chat_template}
        answers = [
            self.answer(column, messages, sampling or self.base_of(column).defaults.sampling, **how)
            for column, messages in column_messages.items()
        ]
        return (delta for _, delta in self.write(answers, should_stop))

    def answer(
        self,
        column: str,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        seed: int,
        chat_template: str | None = None,
    ) -> Answer:
        """An answer that is to be written. Raises NbtuneError as `stream` does."""
        prompt = self.base_of(column).prompt(column, messages, chat_template)
        return self._answer(column, prompt, sampling, max_new_tokens, seed)

    def continuation(
        self, column: str, prompt: Sequence[int], sampling: Sampling, *, max_new_tokens: int, seed: int
    ) -> Answer:
        """As `answer`, to token ids."""
        base = self.base_of(column)
        base.require_room(column, len(prompt))
        return self._answer(column, Prompt(list(prompt), base.stop_tokens, {}), sampling, max_new_tokens, seed)

    def _answer(self, column: str, prompt: Prompt, sampling: Sampling, max_new_tokens: int, seed: int) -> Answer:
        if max_new_tokens < 1:
            raise NbtuneError("Nothing to generate", f"max_new_tokens is {max_new_tokens}.", "Ask for one or more.")
        base = self.base_of(column)
        limits = Limits(prompt.stops, max_new_tokens, base.room(column))
        sampler, text = Sampler(sampling, seed, self.device), TextStream(base.tokenizer)
        return Answer(column, prompt.ids, sampler, text, limits, prompt.beside)

    def prompt(self, column: str, messages: Sequence[Message], chat_template: str | None = None) -> list[int]:
        """The token ids that this column would read. Raises NbtuneError as `stream` does."""
        return self.base_of(column).prompt(column, messages, chat_template).ids

    def score(self, column: str, prompt: Sequence[int], reference: Sequence[int]) -> Score:
        """How likely this column finds the tokens `reference` after the tokens `prompt`, at least one of each.

        Raises NbtuneError where there is none, the column is unknown, or both are longer than the context. Waits as
        `stream` does; a long reference is read in pieces, so that its logits never are in memory at once.
        """
        if not prompt or not reference:
            raise NbtuneError("There is nothing to score", f"{len(prompt)} and {len(reference)} tokens.")
        base = self.base_of(column)
        base.require_room(column, len(prompt) + len(reference) - 1)  # nothing follows the last
        ids = torch.tensor([[*prompt, *reference]], device=self.device)
        whole = base.prompted(column) or base.stateful  # their caches take a text in one piece
        with self._lock:
            self._prepare([column])
            loss = score(partial(base.logits, [column]), ids, len(prompt), DynamicCache(config=base.config), whole)
        return Score(loss, len(reference))

    def mix(self, mix: Mix) -> str:
        """The name of a column that answers with a combination of adapters. It is not among `columns`.

        The name is made of the mix itself, so people who mix differently do not meet. Waits as `stream` does. Raises
        NbtuneError where a column is unknown or has no adapter, and where they cannot be combined so.
        """
        self._check(mix)
        with self._lock:
            self._make(mix)
        return mix.name

    def is_made(self, mix: Mix) -> bool:
        """Whether a combination is in memory, so that it answers at once."""
        return mix.name in self._mixes and self._bases[next(iter(mix.weights))].is_made(mix)

    def save_mix(self, mix: Mix, folder: str | Path) -> None:
        """Write a combination as a new adapter in PEFT's format, with a model card that says what it is made of.

        Raises NbtuneError as `mix` does, and where the folder exists.
        """
        self._check(mix)
        with self._lock:
            self._make(mix).write_mix(mix, Path(folder))

    def hidden_states(self, ids: torch.Tensor) -> Sequence[torch.Tensor]:
        """What the first base makes of a text, as `Base.hidden_states`. Waits as `stream` does."""
        base = self._bases[BASE]
        with self._lock:
            self.memory.bring(base)
            return base.hidden_states(ids)

    def _check(self, mix: Mix) -> None:
        for column in mix.weights:
            if column not in self.columns:
                raise NbtuneError(f"There is no column {column!r}", f"There are: {', '.join(self.columns)}.")
            if column not in self._bases[column].adapters:
                raise NbtuneError(
                    "Only adapters can be combined", f"{column} is a whole model.", "Give weights to adapters only."
                )
            if self._bases[column].prompted(column):
                message = f"{column} is a trained prompt, which has no weighted combinations."
                raise NbtuneError("Only LoRA and IA3 adapters can be combined", message, "Leave it out.")
        if len({id(self._bases[column]) for column in mix.weights}) > 1:
            told = "; ".join(f"{column}: {self._bases[column].spec.name}" for column in mix.weights)
            raise NbtuneError("These adapters have different base models", told, "Combine those of one base.")

    def _make(self, mix: Mix) -> Base:
        base = self._bases[next(iter(mix.weights))]
        self.memory.bring(base)
        base.make([mix])
        self._mixes.pop(mix.name, None)
        self._mixes[mix.name] = mix
        if len(self._mixes) > MIXES:
            del self._mixes[next(iter(self._mixes))]
        return base

    def hold_all(self) -> None:
        """Load every model, for good. Raises NbtuneError where they do not fit into memory together."""
        bases = list(dict.fromkeys(self._bases.values()))
        if not self.memory.fits(bases):
            raise NbtuneError(
                "These models do not fit into memory together",
                "; ".join(f"{base.source.name}: {base.bytes / 1e9:.2f} GB" for base in bases)
                + f". {self.memory.bytes / 1e9:.2f} GB may be used on {self.device}.",
                "Name fewer models, smaller ones, or load_in_4bit.",
            )
        with self._lock:
            for base in bases:
                self.memory.bring(base)

    def close(self) -> None:
        """Give the memory back. The engine cannot be used after."""
        with self._lock:
            self.memory.close()

    def write(
        self, answers: Sequence[Answer], should_stop: Callable[[], bool] = lambda: False
    ) -> Generator[tuple[Answer, Delta], None, None]:
        """Each answer with its next token, a token of each after the other. Ends and waits as `stream` does.

        Those whose models do not fit into memory together are written one group after the other.
        """
        waiting = True
        while waiting and not should_stop():
            waiting = not self._lock.acquire(timeout=0.05)
        if waiting:
            yield from ((answer, answer.stopped()) for answer in answers)
            return
        try:
            groups = self._together(answers)
            while groups:
                batches = self.batches(groups.pop(0))
                for answer, delta in _turns(batches):
                    if delta is not None:
                        yield answer, delta
                    if should_stop():
                        begun = [left for batch in batches for left in batch.answers]
                        yield from ((left, left.stopped()) for left in itertools.chain(begun, *groups))
                        return
        finally:
            self._lock.release()

    def _together(self, answers: Sequence[Answer]) -> list[list[Answer]]:
        """Groups of answers whose models fit into memory together; those that are there already come first."""
        bases = dict.fromkeys(self.base_of(answer.column) for answer in answers)
        groups: list[list[Base]] = []
        for base in sorted(bases, key=lambda base: not base.loaded):
            if groups and self.memory.fits([*groups[-1], base]):
                groups[-1].append(base)
            else:
                groups.append([base])
        return [[answer for answer in answers if self.base_of(answer.column) in group] for group in groups]

    def batches(self, answers: Iterable[Answer]) -> list[Batch]:
        """As few batches as can write these answers."""
        together: dict[Any, list[Answer]] = {}
        for answer in answers:
            together.setdefault((self.shares(answer.column), answer.pictures), []).append(answer)
        return [self._batch(rows) for rows in together.values()]

    def _batch(self, rows: list[Answer]) -> Batch:
        column = rows[0].column
        base = self.base_of(column)
        cache, prompted = DynamicCache(config=base.config), base.prompted(column)
        whole = base.stateful or rows[0].pictures is not None
        return Batch(self._forward, rows, cache, prompted=prompted, whole=whole)

    def shares(self, column: str) -> Any:
        """What two columns have in common where one forward pass can serve both."""
        return self.base_of(column).shares(column)

    def _forward(self, columns: list[str], **inputs: Any) -> torch.Tensor:
        """Logits of the next token of each row [B, V] in float32; all columns are of one base."""
        return self._prepare(columns).forward(columns, **inputs)

    def _prepare(self, columns: Sequence[str]) -> Base:
        """The base of these columns, with their weights in memory."""
        base = self.base_of(columns[0])
        self.memory.bring(base)
        mixes = [self._mixes[column] for column in columns if column in self._mixes]
        if mixes:
            base.make(mixes)  # of those that others have taken the place of
        return base


def _turns(batches: list[Batch]) -> Iterator[tuple[Answer, Delta | None]]:
    """A token of each row after the other, until all have ended; None where a piece of its prompt was read."""
    while any(batch.answers for batch in batches):
        for batch in batches:
            if batch.answers and batch.reads:
                batch.read()
                yield batch.answers[0], None
            elif batch.answers:
                yield from zip(tuple(batch.answers), batch.turn(), strict=True)
