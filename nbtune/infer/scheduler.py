"""Requests of many people at one engine: they are written together, and join and leave while others are written.

scheduler = Scheduler(engine)
with scheduler.request("amber-heron", messages, sampling, max_new_tokens=64, seed=0) as deltas:
    for delta in deltas: ...
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from nbtune.errors import NbtuneError
from nbtune.infer.batch import Answer, Batch, Delta
from nbtune.infer.engine import Engine
from nbtune.infer.sampling import Sampling
from nbtune.infer.text import Message

logger = logging.getLogger(__name__)

WAITING = 64  # requests that are taken beyond those that are being written


class BusyError(NbtuneError):
    """More requests wait than are taken."""


class ModelFailedError(NbtuneError):
    """The forward pass of a batch failed; other batches go on."""


class Scheduler:
    """The one thread that runs the model. A request that comes joins the batch after its prompt is read.

    Args:
        engine: Whose columns answer. Nobody else may use it.
        rows: Answers that are written at the same time; others wait.
    """

    def __init__(self, engine: Engine, rows: int = 16) -> None:
        self.engine = engine
        self._rows = rows
        self._changed = threading.Condition()
        self._waiting: list[Answer] = []
        self._queues: dict[Answer, queue.SimpleQueue[Delta | NbtuneError]] = {}
        self._batches: list[Batch] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="nbtune-scheduler", daemon=True)
        self._thread.start()

    @contextmanager
    def request(
        self, column: str, messages: Sequence[Message], sampling: Sampling, *, max_new_tokens: int, seed: int
    ) -> Iterator[Iterator[Delta]]:
        """The deltas of an answer; left early, its row is given to others.

        Raises NbtuneError as `Engine.stream` does, and where too many wait already.
        """
        answer = self.engine.answer(column, messages, sampling, max_new_tokens=max_new_tokens, seed=seed)
        with self._changed:
            if self._closed:
                raise NbtuneError("The server is closing", "", "Ask again when it runs.")
            if len(self._waiting) >= WAITING:
                raise BusyError(
                    "Too many requests wait", f"{len(self._waiting)} are before this one.", "Ask again later."
                )
            deltas = self._queues[answer] = queue.SimpleQueue()
            self._waiting.append(answer)
            self._changed.notify_all()
        try:
            yield _until_the_end(deltas)
        finally:
            with self._changed:
                answer.left = True
                self._queues.pop(answer, None)

    def close(self) -> None:
        """End every answer, and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting or self._batches)
                if self._closed:
                    self._fail(list(self._queues), NbtuneError("The server is closing", "", "Ask again when it runs."))
                    return
                room = max(0, self._rows - sum(len(batch.answers) for batch in self._batches))
                come, self._waiting = self._waiting[:room], self._waiting[room:]
            self._advance(self._batches)
            self._batches += self.engine.batches([answer for answer in come if not answer.left])
            self._join()

    def _join(self) -> None:
        """Put rows together that one forward pass can serve, once their prompts are read."""
        joined: dict[Any, Batch] = {}
        for batch in tuple(self._batches):
            if not batch.can_join():
                continue
            first = joined.setdefault(self.engine.shares(batch.answers[0].column), batch)
            if first is not batch:
                first.join(batch)
                self._batches.remove(batch)

    def _advance(self, batches: list[Batch]) -> None:
        """Write a token of every row, or read a piece of its prompt. Batches that have ended, or failed, leave."""
        for batch in tuple(batches):
            answers = tuple(batch.answers)
            try:
                if batch.reads:
                    batch.read()
                else:
                    for answer, delta in zip(answers, list(batch.turn()), strict=True):
                        self._give(answer, delta)
            except Exception as error:
                logger.exception("A batch of %d answers failed", len(answers))
                message = f"{type(error).__name__}: {error}"
                self._fail(answers, ModelFailedError("The model failed", message, "The server's log says where."))
                batch.answers.clear()
            if not batch.answers:
                batches.remove(batch)

    def _give(self, answer: Answer, item: Delta | NbtuneError) -> None:
        with self._changed:
            waiting = self._queues.get(answer)
        if waiting is not None:
            waiting.put(item)

    def _fail(self, answers: Sequence[Answer], error: NbtuneError) -> None:
        for answer in answers:
            self._give(answer, error)


def _until_the_end(deltas: queue.SimpleQueue[Delta | NbtuneError]) -> Iterator[Delta]:
    while True:
        item = deltas.get()
        if isinstance(item, NbtuneError):
            raise item
        yield item
        if item.finished:
            return
