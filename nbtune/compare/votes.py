"""Votes: which answer somebody found best, one line each in `votes.jsonl` in the folder of the runs.

    ballots = Ballots(runs_dir / "votes.jsonl")
    ballots.add(Vote(question, ("amber-heron", "base"), best=("base",), blind=True, model="smollm2-135m-instruct"))
    standings(ballots.votes(), ["base", "amber-heron"])      # nbtune.compare.standings

The file only grows. Any number of threads and processes may add to it.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import uuid
from collections.abc import Collection
from pathlib import Path

from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from nbtune.errors import NbtuneError

Setting = float | int | str | bool | None

VOTES = "votes.jsonl"  # in the folder of the runs


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


@dataclasses.dataclass(frozen=True)
class Vote:
    """What somebody thought of the answers to one question.

    best: one column; several or all of them are a tie; none means that all were bad. Raises NbtuneError where a name is
    unknown or twice there, fewer than two columns were shown, the time is no time, or a text is missing.
    """

    question: str
    columns: tuple[str, ...]  # in the order shown
    best: tuple[str, ...]
    blind: bool
    model: str  # the base model: its column is "base" in every folder
    sampling: dict[str, Setting] = dataclasses.field(default_factory=dict)
    seed: int = 0
    system: str = ""  # the system prompt
    at: str = dataclasses.field(default_factory=_now)  # ISO 8601 with a zone
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        for name in ("question", "model", "id"):
            if not getattr(self, name).strip():
                raise NbtuneError("A vote is incomplete", f"Its {name} is empty.")
        if len(self.columns) < 2:
            raise NbtuneError("There is nothing to vote on", f"{len(self.columns)} column was shown; it takes two.")
        for name, columns in (("columns", self.columns), ("best", self.best)):
            if len(set(columns)) < len(columns):
                raise NbtuneError("A column is in a vote twice", f"{name}: {', '.join(columns)}.")
        if unknown := [name for name in self.best if name not in self.columns]:
            raise NbtuneError(
                "A vote is for a column that was not shown",
                f"It is for {unknown[0]!r}; there were: {', '.join(self.columns)}.",
            )
        try:
            zone = datetime.datetime.fromisoformat(self.at).tzinfo
        except ValueError as error:
            raise NbtuneError("A vote has no time", f"{self.at!r} is not a time in ISO 8601.") from error
        if zone is None:
            raise NbtuneError("A vote has no time", f"{self.at!r} does not say its time zone.")

    @property
    def seconds(self) -> float:
        """When it was given, in unix seconds."""
        return datetime.datetime.fromisoformat(self.at).timestamp()


_LINE = TypeAdapter(Vote)


class Ballots:
    """The file of votes. It need not exist yet."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock_file = self.path.with_name(f".{self.path.name}.lock")

    def add(self, vote: Vote) -> None:
        """Append one vote; it is on the disk when this returns. Raises NbtuneError where it cannot be written."""
        try:
            line = _LINE.dump_json(vote) + b"\n"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._lock_file), self.path.open("ab") as file:
                file.write(line if self._ends_whole() else b"\n" + line)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, ValueError) as error:  # ValueError: text that is not UTF-8
            raise NbtuneError("The vote is not kept", f"{self.path}: {error}", "Mend this, and vote again.") from error

    def votes(self, columns: Collection[str] | None = None, *, model: str | None = None) -> list[Vote]:
        """The votes in the order given: all, those on two or more of `columns`, those on one base `model`."""
        return [
            vote
            for vote in self.read()[0]
            if (model is None or vote.model == model)
            and (columns is None or len(set(vote.columns).intersection(columns)) > 1)
        ]

    def read(self) -> tuple[list[Vote], int]:
        """All votes, each id once, and how many lines are no vote: torn by a crash, or edited."""
        votes: dict[str, Vote] = {}
        unreadable = 0
        for line in self.path.read_bytes().splitlines() if self.path.exists() else ():
            if not line.strip():
                continue
            try:
                vote = _LINE.validate_json(line)
            except (ValidationError, NbtuneError):
                unreadable += 1
            else:
                votes.setdefault(vote.id, vote)
        return list(votes.values()), unreadable

    def _ends_whole(self) -> bool:
        """Whether the last line has its end; a process that was killed may have left half a line."""
        with self.path.open("rb") as file:
            if not file.seek(0, os.SEEK_END):
                return True
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
