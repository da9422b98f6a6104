"""One question to all columns: each column's own conversation, grown by a question and its answer."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from nbtune.errors import NbtuneError
from nbtune.infer.sampling import Sampling

if TYPE_CHECKING:
    from nbtune.infer.engine import Engine, Finish, Stats

History = list[dict[str, str]]  # messages of one column, user and assistant in turn

# Faster than the eye reads, slow enough that drawing the page does not take time from the model.
SECONDS_BETWEEN_VIEWS = 0.1


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """What the page lets people choose besides the question."""

    sampling: Sampling
    max_new_tokens: int = 256
    seed: int = 0
    system: str = ""  # empty: what the chat template says by itself


@dataclasses.dataclass
class View:
    """What a page shows at one moment."""

    histories: dict[str, History]
    stats: dict[str, Stats]
    finished: dict[str, Finish]
    seconds: float  # since the question, all columns together

    @property
    def done(self) -> bool:
        return len(self.finished) == len(self.histories)

    @property
    def tokens_per_second(self) -> float:
        """Of all columns together, prompts included in the time."""
        return sum(stats.tokens for stats in self.stats.values()) / self.seconds if self.seconds else 0.0


def ask(
    engine: Engine,
    histories: Mapping[str, History],
    question: str,
    settings: ChatSettings,
    should_stop: Callable[[], bool],
) -> Iterator[View]:
    """Views of the answers while they are written, about ten a second; the last one is `done`.

    `histories` is left as it is. Raises NbtuneError before the first view where a column cannot answer.
    """
    if not question.strip():
        raise NbtuneError("There is no question", "", "Type one, or choose an example.")
    asked = {name: [*histories.get(name, []), {"role": "user", "content": question}] for name in engine.columns}
    system = [{"role": "system", "content": settings.system}] if settings.system.strip() else []
    deltas = engine.stream(
        {name: [*system, *history] for name, history in asked.items()},
        settings.sampling,
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed,
        should_stop=should_stop,
    )
    return _views(asked, deltas)


def _views(asked: dict[str, History], deltas: Iterator) -> Iterator[View]:
    answers = dict.fromkeys(asked, "")
    stats: dict[str, Stats] = {}
    finished: dict[str, Finish] = {}
    start = shown = time.perf_counter()

    def view() -> View:
        histories = {name: [*asked[name], {"role": "assistant", "content": answers[name]}] for name in asked}
        return View(histories, dict(stats), dict(finished), time.perf_counter() - start)

    yield view()
    for delta in deltas:
        answers[delta.column] += delta.text
        stats[delta.column] = delta.stats
        if delta.finished:
            finished[delta.column] = delta.finished
        if time.perf_counter() - shown >= SECONDS_BETWEEN_VIEWS or len(finished) == len(asked):
            shown = time.perf_counter()
            yield view()
