"""The votes of an arena: counted into `votes.jsonl` beside the runs, ranked, and sent to MLflow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from nbtune.compare.conversation import ChatSettings, Conversation
from nbtune.compare.standings import Standing, standings
from nbtune.compare.vote_tracking import VoteTracker
from nbtune.compare.votes import VOTES, Ballots, Vote


class Ballot:
    """Votes on the answers of one base model and its columns.

    folder: of the runs. on_warning: told once, from another thread, where MLflow does not take the votes.
    """

    def __init__(self, folder: Path, model: str, columns: Sequence[str], on_warning: Callable[[str], None]) -> None:
        self.folder, self.model, self.columns = folder, model, tuple(columns)
        self._ballots = Ballots(folder / VOTES)
        self._on_warning = on_warning
        self._tracker: VoteTracker | None = None  # from the first vote on: MLflow takes memory and seconds to load
        self._read: tuple[tuple[int, int], list[Vote], int] | None = None

    def cast(self, conversation: Conversation, best: Sequence[str], settings: ChatSettings) -> None:
        """Count a vote for the answers to the last question. Raises NbtuneError where it cannot be written."""
        turn = conversation.turns[-1]
        names = {name: turn.counted_as.get(name, name) for name in conversation.order}
        vote = Vote(
            question=turn.question.text,
            columns=tuple(names.values()),
            best=tuple(names[name] for name in best),
            blind=True,
            model=self.model,
            sampling=settings.sampling.model_dump(),
            seed=settings.seed + turn.tries,
            system=settings.system,
        )
        self._ballots.add(vote)
        if self._tracker is None:
            self._tracker = VoteTracker(self._ballots, self.model, on_warning=self._on_warning)
        self._tracker.changed()

    @property
    def votes(self) -> list[Vote]:
        """All votes on this base model, those of other arenas and pages with them."""
        return self._known()[0]

    @property
    def unreadable(self) -> int:
        """Lines of the file that are no votes."""
        return self._known()[1]

    def standings(self, columns: Sequence[str] | None = None) -> list[Standing]:
        """How these columns stand (the arena's own), the best first."""
        return standings(self.votes, columns or self.columns)

    def close(self) -> None:
        """Send to MLflow what is left."""
        if self._tracker is not None:
            self._tracker.close()

    def _known(self) -> tuple[list[Vote], int]:
        """What the file holds, read again when it has grown."""
        path = self._ballots.path
        if not path.exists():
            return [], 0
        status = path.stat()
        seen = (status.st_mtime_ns, status.st_size)
        if self._read is None or self._read[0] != seen:
            votes, unreadable = self._ballots.read()
            self._read = seen, [vote for vote in votes if vote.model == self.model], unreadable
        return self._read[1], self._read[2]
