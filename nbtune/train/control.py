"""What is asked of a run while it trains: to pause, to stop, to go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from nbtune import _files
from nbtune.train.events import Event

Wish = Literal["go on", "pause", "stop"]
FILE = ".wish"
PAUSE_SECONDS = 0.1  # between two questions whether to go on


class Control:
    """The last wish for the run at `path`: of any thread of this process, or of another one, which leaves it in a file.

    The training thread looks before every forward pass, and ten times a second while it waits. Where a run is trained
    by other processes (`passes_on`), this one only leaves its wishes there.
    """

    def __init__(self, path: Path, *, passes_on: bool = False) -> None:
        self._file = path / FILE
        self._wish: Wish = "go on"
        self._passes_on = passes_on

    @property
    def wish(self) -> Wish:
        if self._passes_on:
            return self._wish
        try:
            text = self._file.read_text(encoding="utf-8")
            self._file.unlink()
        except FileNotFoundError:
            return self._wish
        if text in ("go on", "pause", "stop"):
            self._wish = text
        return self._wish

    @wish.setter
    def wish(self, wish: Wish) -> None:
        self._wish = wish
        if self._passes_on:
            leave_wish(self._file.parent, wish)
        else:
            self._file.unlink(missing_ok=True)

    def should_stop(self) -> bool:
        return self.wish == "stop"

    def should_pause(self) -> bool:
        return self.wish == "pause"


def leave_wish(path: Path, wish: Wish) -> None:
    """Tell the process that trains the run at `path`."""
    _files.write_text(path / FILE, wish)


def wait_while(should_pause: Callable[[], bool], step: int, on_event: Callable[[Event], None]) -> None:
    """Wait, after `step` optimiser steps, as long as `should_pause` says."""
    on_event({"type": "pause", "step": step})
    began = time.perf_counter()
    while should_pause():
        time.sleep(PAUSE_SECONDS)
    on_event({"type": "continue", "step": step, "seconds": time.perf_counter() - began})
