"""The errors a person can cause: each has a title, what happened, and what to do about it."""

from __future__ import annotations


class NbtuneError(Exception):
    """Something a user can mend. `str()` shows title, message and remedy, one under the other."""

    def __init__(self, title: str, message: str = "", remedy: str = "") -> None:
        super().__init__("\n".join(part for part in (title, message, remedy) if part))
        self.title = title
        self.message = message
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[NbtuneError], tuple[str, str, str]]:
        return type(self), (self.title, self.message, self.remedy)


class SpecError(NbtuneError, ValueError):
    """A setting is unknown or has a value it cannot have."""


class ModelError(NbtuneError, ValueError):
    """The model cannot be found, read or held in memory."""


class DataError(NbtuneError, ValueError):
    """The data cannot be found, read, or trained on."""


class AdapterError(NbtuneError, ValueError):
    """An adapter does not fit its config, its file or its base model."""


class RunError(NbtuneError, RuntimeError):
    """A run cannot be started, resumed or opened."""


class SweepError(NbtuneError, ValueError):
    """A sweep cannot be made, started or opened."""


class ExportError(NbtuneError, RuntimeError):
    """An export cannot be made, or what was written does not answer as the adapter does."""


def told(error: BaseException) -> str:
    """The error for a person: title, what happened, remedy, a line each; of others than ours, the name leads."""
    if isinstance(error, NbtuneError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
