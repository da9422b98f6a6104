"""Which column answers a prompt: by a rule, by patterns, or by likeness to what each adapter was trained on.

    router = BySimilarity(Nearest(indexes, embedder))
    decision = router.route("What does os.path.join do?")
    decision.column, decision.score, decision.reason     # "amber-heron", 0.71, "nearest to the data of amber-heron ..."

`nbtune.router` makes one from runs. Where nothing fits, the base answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import re2

from nbtune.errors import NbtuneError
from nbtune.infer.columns import BASE
from nbtune.infer.similarity import Nearest

MAX_CHARACTERS = 20_000  # of a prompt that patterns are held against

Rule = Callable[[str], str | None]


@dataclasses.dataclass(frozen=True)
class Decision:
    """Who answers a prompt, and why."""

    column: str
    score: float  # a cosine, or 1 and 0 for what a rule or a pattern says
    second: str | None  # the column that would answer otherwise; none where there is no other
    second_score: float
    reason: str  # for people


class Router(Protocol):
    """Chooses a column for each prompt."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that it may choose, the base first."""
        ...

    def route(self, prompt: str) -> Decision: ...


class ByRule:
    """A Python function says the column; None or `"base"` means the base."""

    def __init__(self, rule: Rule, columns: Sequence[str]) -> None:
        self.rule = rule
        self.columns = _with_base(columns)

    def route(self, prompt: str) -> Decision:
        """Raises NbtuneError where the rule names a column that there is not; what the rule itself raises passes."""
        said = self.rule(prompt)
        column = BASE if said is None else said
        if column not in self.columns:
            raise NbtuneError(
                "The rule chose a column that there is not",
                f"It said {said!r}; there are: {', '.join(self.columns)}.",
                "Return one of them, or None for the base.",
            )
        return Decision(column, 1.0, None, 0.0, f"the rule says {'the base' if said is None else column}")


class ByPattern:
    """The first pattern that is found in a prompt says the column.

    Patterns are in the language of RE2, which has no look-around and no back-references, so a search takes time in
    proportion to the text whatever the pattern; and only the first `MAX_CHARACTERS` of a prompt are searched. Raises
    NbtuneError for a pattern that RE2 does not read, or of a column that there is not.
    """

    def __init__(self, patterns: Mapping[str, str], columns: Sequence[str]) -> None:
        self.columns = _with_base(columns)
        if unknown := [name for name in patterns if name not in self.columns]:
            raise NbtuneError(
                f"A pattern is for {unknown[0]!r}, which is no column", f"There are: {', '.join(self.columns)}."
            )
        self.patterns = {name: _compiled(name, pattern) for name, pattern in patterns.items()}

    def route(self, prompt: str) -> Decision:
        text = prompt[:MAX_CHARACTERS].encode("utf-8", "replace").decode()
        found = [(name, match) for name, pattern in self.patterns.items() if (match := pattern.search(text))]
        if not found:
            return Decision(BASE, 0.0, None, 0.0, "no pattern is found in the prompt")
        (column, match), *others = found
        second = others[0][0] if others else BASE
        reason = f"the pattern of {column} finds {_short(match.group())!r}"
        return Decision(column, 1.0, second, 1.0 if others else 0.0, reason)


class BySimilarity:
    """The column whose training prompts are nearest, or the base where none is near enough.

    threshold: the least score; none takes for each column what its own training prompts tell (`Nearest.least`).
    """

    def __init__(self, nearest: Nearest, threshold: float | None = None) -> None:
        if threshold is not None and not -1 <= threshold <= 1:
            raise NbtuneError("The threshold is out of range", f"It is {threshold:g}; a score is from -1 to 1.")
        self.nearest = nearest
        self.threshold = threshold
        self.columns = _with_base(list(nearest.least))

    def route(self, prompt: str) -> Decision:
        ranked = sorted(self.nearest.scores(prompt).items(), key=lambda item: -item[1])
        best, score = ranked[0]
        least = self.nearest.least[best] if self.threshold is None else self.threshold
        if score < least:
            reason = f"nearest is the data of {best}, but {score:.2f} is below {least:.2f}"
            return Decision(BASE, score, best, score, reason)
        second, second_score = ranked[1] if len(ranked) > 1 else (BASE, least)
        beside = f"{second} has {second_score:.2f}" if len(ranked) > 1 else f"at least {least:.2f}"
        return Decision(best, score, second, second_score, f"nearest to the data of {best}: {score:.2f}; {beside}")


def _with_base(columns: Sequence[str]) -> tuple[str, ...]:
    return (BASE, *(name for name in columns if name != BASE))


def _compiled(name: str, pattern: str) -> Any:
    options = re2.Options()
    options.log_errors = False  # it would write to the terminal
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        raise NbtuneError(
            f"The pattern of {name} cannot be used",
            f"{pattern!r}: {_said(error)}.",
            "Patterns are those of RE2: no look-around, no back-references.",
        ) from error


def _said(error: Exception) -> str:
    said = error.args[0] if error.args else error
    return said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"
