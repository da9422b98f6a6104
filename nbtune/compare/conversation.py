"""A conversation with several columns at once: its turns, what each column reads, and what it answers meanwhile."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nbtune.errors import NbtuneError
from nbtune.infer.attachments import Context
from nbtune.infer.sampling import Sampling

if TYPE_CHECKING:
    from nbtune.infer.batch import Answer, Delta, Finish, Stats
    from nbtune.infer.engine import Engine

History = list[dict[str, Any]]  # messages of one column, user and assistant in turn

# Faster than the eye reads, slow enough that drawing the page does not take time from the model.
SECONDS_BETWEEN_VIEWS = 0.1
NO_FILES = Context("", 0, 0, ())


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """What the page lets people choose besides the question."""

    sampling: Sampling
    max_new_tokens: int = 256
    seed: int = 0
    system: str = ""  # empty: what the chat template says by itself
    chat_template: str | None = None  # none: the model's own


@dataclasses.dataclass(frozen=True)
class Question:
    """What was typed, and the files beside it."""

    text: str
    files: Context = NO_FILES

    @property
    def content(self) -> str | list[dict[str, Any]]:
        """What the columns read."""
        return self.files.content(self.text)


@dataclasses.dataclass
class Turn:
    """A question, and what each column answered. A column that was not there then has no answer."""

    question: Question
    answers: dict[str, str] = dataclasses.field(default_factory=dict)
    stats: dict[str, Stats] = dataclasses.field(default_factory=dict)
    finished: dict[str, Finish] = dataclasses.field(default_factory=dict)  # without those that are being written
    labels: dict[str, str] = dataclasses.field(default_factory=dict)  # what is said of a column for this turn alone
    counted_as: dict[str, str] = dataclasses.field(default_factory=dict)  # in votes, where not by its name
    tries: int = 0  # how often it was answered again: another seed each time

    def take(self, view: View) -> None:
        """What a view of its answers says; answers of other columns stay."""
        self.answers |= view.answers
        self.stats |= view.stats
        for name in view.answers:
            self.finished.pop(name, None)
        self.finished |= view.finished


@dataclasses.dataclass
class Conversation:
    """Turns, and the columns in the order in which they are shown.

    In blind mode the order is shuffled and names are hidden until there was a vote; what comes after it is a new round.
    """

    columns: tuple[str, ...]
    blind: bool = False
    voted: bool = False
    turns: list[Turn] = dataclasses.field(default_factory=list)
    order: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.begin()

    @property
    def hidden(self) -> bool:
        """Whether nobody may see which column is which."""
        return self.blind and not self.voted

    @property
    def can_vote(self) -> bool:
        """Whether every column has answered the last question, and nobody knows which is which."""
        last = self.turns[-1] if self.turns else None
        return self.hidden and last is not None and set(last.finished) == set(self.order) and any(last.answers.values())

    def begin(self) -> None:
        """Forget all turns; in blind mode shuffle."""
        self.turns, self.voted = [], False
        blind = random.SystemRandom().sample(self.columns, len(self.columns)) if self.blind else self.columns
        self.order = tuple(blind)

    def shows(self, columns: tuple[str, ...]) -> None:
        """Show other columns: a new round in blind mode, where a column that comes or goes would give itself away."""
        if columns == self.columns:
            return
        self.columns = self.order = columns
        if self.blind:
            self.begin()

    def messages(self, column: str, settings: ChatSettings, question: Question, before: int) -> History:
        """What a column reads before it answers a question that follows on the first `before` turns."""
        found: History = [{"role": "system", "content": settings.system}] if settings.system.strip() else []
        for turn in self.turns[:before]:
            if column in turn.answers:
                found.append({"role": "user", "content": turn.question.content})
                found.append({"role": "assistant", "content": turn.answers[column]})
        return [*found, {"role": "user", "content": question.content}]

    def shown(self, column: str) -> History:
        """What the page shows of a column: files are a message of their own, before the question."""
        found: History = []
        for turn in self.turns:
            if column not in turn.answers:
                continue
            if shares := turn.question.files.shares:
                listed = "\n".join(f"> `{share.text.replace('`', chr(39))}`" for share in shares)
                found.append({"role": "user", "content": listed})
            found.append({"role": "user", "content": turn.question.text})
            found.append({"role": "assistant", "content": turn.answers[column]})
        return found

    def turn_of(self, column: str, message: int) -> int:
        """The turn whose question a message of `shown` is. Raises NbtuneError where it is another message."""
        place = -1
        for number, turn in enumerate(self.turns):
            if column not in turn.answers:
                continue
            place += 2 if turn.question.files.shares else 1
            if place == message:
                return number
            place += 1
        raise NbtuneError("Only questions can be edited", "", "Edit the text of a question, or attach files again.")


@dataclasses.dataclass(frozen=True)
class View:
    """What a page shows at one moment of the answers to one question."""

    answers: dict[str, str]
    stats: dict[str, Stats]
    finished: dict[str, Finish]
    seconds: float  # since the question, all columns together

    @property
    def done(self) -> bool:
        return len(self.finished) == len(self.answers)

    @property
    def tokens_per_second(self) -> float:
        """Of all columns together, prompts included in the time."""
        return sum(stats.tokens for stats in self.stats.values()) / self.seconds if self.seconds else 0.0


def answer(
    engine: Engine,
    messages: Mapping[str, History],
    columns: Mapping[str, str],
    settings: ChatSettings,
    should_stop: Callable[[], bool],
) -> Iterator[View]:
    """Views of the answers while they are written, about ten a second; the last one is `done`.

    messages: by shown column, what it reads. columns: by shown column, which of the engine's answers there. Raises
    NbtuneError before the first view where a column cannot answer.
    """
    answers = {
        engine.answer(
            columns[name],
            read,
            settings.sampling,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            chat_template=settings.chat_template,
        ): name
        for name, read in messages.items()
    }
    return _views(answers, engine.write(tuple(answers), should_stop))


def _views(names: Mapping[Answer, str], deltas: Iterator[tuple[Answer, Delta]]) -> Iterator[View]:
    answers = dict.fromkeys(names.values(), "")
    stats: dict[str, Stats] = {}
    finished: dict[str, Finish] = {}
    start = shown = time.perf_counter()

    def view() -> View:
        return View(dict(answers), dict(stats), dict(finished), time.perf_counter() - start)

    yield view()
    for written, delta in deltas:
        name = names[written]
        answers[name] += delta.text
        stats[name] = delta.stats
        if delta.finished:
            finished[name] = delta.finished
        if time.perf_counter() - shown >= SECONDS_BETWEEN_VIEWS or len(finished) == len(answers):
            shown = time.perf_counter()
            yield view()
