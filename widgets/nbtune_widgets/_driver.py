"""Who draws a view of something that goes on: a daemon thread, the cell that shows it, or the kernel's event loop.

Whoever drives is the only one that writes to the widgets. Callbacks put a word on a queue and nothing else: depending
on the kernel they run on the main thread, or on a foreign thread with another event loop.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import traceback
from typing import Any, Self

from nbtune_widgets import _reports
from nbtune_widgets._style import notice

IDLE_SECONDS = 2.0  # how often what has ended is looked at, in case code lets it go on


class Driver:
    """Looks at something every `interval` seconds. A view says in `_step` what a look is.

    Args:
        name: Of the thread.
        what: Is shown: "run", "sweep".
        interval: Seconds between two looks.
    """

    def __init__(self, name: str, what: str, interval: float) -> None:
        self.interval = interval
        self.error: str | None = None  # what went wrong in the view itself, not in what it shows
        self._thread_name, self._what = name, what
        self._commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._leave = threading.Event()
        self._thread: threading.Thread | None = None
        self._blocking = False

    def _step(self) -> bool:
        """Obey, draw, and say whether it has ended."""
        raise NotImplementedError

    def _interrupted(self) -> None:
        """The kernel was interrupted while a cell pumped."""
        raise NotImplementedError

    def say(self, html: str) -> None:
        """Show a piece of news."""
        raise NotImplementedError

    def pump(self) -> None:
        """Draw from this thread until the end. An interrupt of the kernel is obeyed, a second one leaves."""
        self._take_over()
        self._blocking = True
        stopping = False
        try:
            while True:
                try:
                    if self._step():
                        return
                    self._wake.wait(self.interval)
                    self._wake.clear()
                except KeyboardInterrupt:
                    if stopping:
                        raise
                    stopping = True
                    self._interrupted()
        finally:
            self._blocking = False

    async def pump_async(self) -> None:
        """As `pump`, but awaits between two looks, so that the kernel handles the buttons meanwhile."""
        self._take_over()
        self._blocking = True
        try:
            while not self._step():
                until = time.monotonic() + self.interval
                while time.monotonic() < until and not self._wake.is_set():
                    await asyncio.sleep(min(0.1, self.interval))
                self._wake.clear()
        finally:
            self._blocking = False

    def start(self) -> Self:
        """Draw from a daemon thread, until `close()`; returns at once."""
        if self._thread is None or not self._thread.is_alive():
            self._leave.clear()
            self._thread = threading.Thread(target=self._follow, name=self._thread_name, daemon=True)
            self._thread.start()
        return self

    def _follow(self) -> None:
        """The updater thread."""
        try:
            while not self._leave.is_set():
                ended = self._step()
                self._wake.wait(IDLE_SECONDS if ended else self.interval)
                self._wake.clear()
        except Exception as error:  # noqa: BLE001 - a thread's exception is seen by nobody: keep it and show it
            self.error = f"{type(error).__name__}: {error}"
            text = f"The view of this {self._what} failed; the {self._what} itself is not touched.\n{self.error}"
            where = "".join(traceback.format_exception(error))
            self.say(notice(text, "error") + _reports.folded("Traceback of the view", where))

    def _take_over(self) -> None:
        """Make this thread the one that writes: end the updater thread and wait for it."""
        self._leave.set()
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._thread = None
        self._wake.clear()

    def _tell(self, command: Any) -> None:
        """All that a callback does. Where nobody drives any more (a cell that pumped has ended) a thread takes over."""
        self._commands.put(command)
        self._wake.set()
        if not self._blocking:
            self.start()
