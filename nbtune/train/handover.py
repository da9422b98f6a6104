"""How a notebook gets a run that was trained for it: in a sweep whose trials are trained together.

Such a trial is done in two parts. First its notebook is asked which run it makes: it is executed as far as
`nbtune.train(spec)`, which raises `Asked` inside `asking()`. The run is trained, with those of other trials, and its
notebook is executed for its report: there `nbtune.train(spec)` returns the run that is named by `NBTUNE_TRAINED`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from nbtune import _files
from nbtune.errors import RunError
from nbtune.spec import RunSpec

VARIABLE = "NBTUNE_TRAINED"  # the folder of the run
FILE = "asked.json"  # in it: the spec as the notebook gave it

_asking: ContextVar[bool] = ContextVar("asking", default=False)


class Asked(BaseException):
    """The run that a notebook makes. No Exception: a notebook that catches those must not go on."""

    def __init__(self, spec: RunSpec) -> None:
        super().__init__(spec)
        self.spec = spec


@contextmanager
def asking() -> Iterator[None]:
    """Inside, `nbtune.train(spec)` trains nothing and raises `Asked`."""
    token = _asking.set(True)
    try:
        yield
    finally:
        _asking.reset(token)


def hand_over(run: Path, spec: RunSpec) -> None:
    """Write down in a run's folder for which spec it is trained."""
    _files.write_text(run / FILE, _text(spec))


def handed_over(spec: RunSpec) -> Path | None:
    """The folder of the run that was trained for this spec; None where none was, and it is to be trained now.

    Raises RunError where the run that was trained is another one.
    """
    if _asking.get():
        raise Asked(spec)
    folder = os.environ.get(VARIABLE)
    if folder is None:
        return None
    trained = (Path(folder) / FILE).read_text(encoding="utf-8")
    if trained != _text(spec):
        names = _differing(json.loads(trained), json.loads(_text(spec)))
        raise RunError(
            "The notebook asks for another run than was trained for it",
            f"Executed twice, it gave two specs, which differ in {', '.join(names)}.",
            "Let its spec depend on its parameters only, not on the time or on chance, or sweep with together=False.",
        )
    return Path(folder)


def _text(spec: RunSpec) -> str:
    return json.dumps(spec.to_dict(), sort_keys=True, indent=1) + "\n"


def _differing(one: object, other: object, path: str = "") -> list[str]:
    """The paths of settings that are not the same."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = sorted(one.keys() | other.keys())
        return [p for name in names for p in _differing(one.get(name), other.get(name), f"{path}.{name}".lstrip("."))]
    return [] if one == other else [path]
