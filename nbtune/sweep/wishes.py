"""What is asked of a sweep while it runs, from any thread; the sweep's own thread looks several times a second."""

from __future__ import annotations

import threading
from pathlib import Path

from nbtune.sweep.space import Point
from nbtune.train.control import Control


class Wishes:
    """The wishes for the sweep at `path`; another process leaves that to stop in a file (`leave_wish`)."""

    def __init__(self, path: Path) -> None:
        self._control = Control(path)
        self._lock = threading.Lock()
        self._added: list[Point] = []
        self._warnings: list[str] = []
        self.stopped: set[int] = set()  # numbers of trials
        self.interrupted = False

    @property
    def stop_all(self) -> bool:
        return self._control.should_stop()

    def go_on(self) -> None:
        """Forget what was asked of an earlier life of the sweep."""
        self._control.wish = "go on"
        self.stopped.clear()
        self.interrupted = False

    def stop(self) -> None:
        self._control.wish = "stop"

    def add(self, point: Point) -> None:
        with self._lock:
            self._added.append(point)

    def warn(self, message: str) -> None:
        with self._lock:
            if message not in self._warnings:
                self._warnings.append(message)

    def has_added(self) -> bool:
        with self._lock:
            return bool(self._added)

    def take_added(self) -> list[Point]:
        with self._lock:
            added, self._added = self._added, []
        return added

    def take_warnings(self) -> list[str]:
        with self._lock:
            warnings, self._warnings = self._warnings, []
        return warnings
