"""One background thread for what takes longer than a click: reading a model, reading data, planning, starting."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable

EXIT_SECONDS = 30  # how long the end of the process waits for the task that is under way


class Worker:
    """Does what it is asked, one thing at a time, in the order asked; of two askings with one key only the later.

    Args:
        name: Of the thread.
        on_status: Told what is being done, and "" when there is nothing left to do. On the worker's thread.
        on_error: Told of the key and the exception of work that failed. On the worker's thread.
    """

    def __init__(self, name: str, on_status: Callable[[str], None], on_error: Callable[[str, Exception], None]) -> None:
        self._on_status = on_status
        self._on_error = on_error
        self._asked: dict[str, tuple[str, Callable[[], object]]] = {}
        self._idle: dict[str, tuple[str, Callable[[], object]]] = {}  # for when nothing else is asked
        self._changed = threading.Condition()  # of a lock that its holder may take again
        self._busy = False
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()
        # Python that ends while this thread imports torch aborts ("terminate called without an active exception").
        atexit.register(self._leave)

    def ask(self, key: str, status: str, work: Callable[[], object], *, idle: bool = False) -> None:
        """Have `work` done soon; what waits under the same key is forgotten. With `idle`, after all else."""
        with self._changed:
            for asked in (self._asked, self._idle):
                asked.pop(key, None)
            (self._idle if idle else self._asked)[key] = (status, work)
            self._changed.notify_all()

    def wait(self, timeout: float | None = None) -> None:
        """Block until nothing is left to do, at once where the work itself asks.

        Raises TimeoutError after `timeout` seconds.
        """
        if threading.current_thread() is self._thread:
            return
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or not (self._waiting or self._busy), timeout):
                keys = ", ".join([*self._asked, *self._idle])
                raise TimeoutError(f"still at work after {timeout} s: {keys or 'on its last task'}")

    def forget(self) -> None:
        """Forget what waits: something has come that needs the machine."""
        with self._changed:
            self._asked.clear()
            self._idle.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """Forget what waits; the thread ends after what it is doing."""
        with self._changed:
            self._closed = True
            self.forget()

    @property
    def _waiting(self) -> bool:
        return bool(self._asked or self._idle)

    def _leave(self) -> None:
        self.close()
        self._thread.join(EXIT_SECONDS)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                if not self._waiting:
                    self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    atexit.unregister(self._leave)
                    return
                asked = self._asked or self._idle
                key = next(iter(asked))
                status, work = asked.pop(key)
                self._busy = True
            self._on_status(status)
            try:
                work()
            except Exception as error:  # noqa: BLE001 - a thread's exception is seen by nobody: hand it on
                self._on_error(key, error)
            if not self._waiting:
                self._on_status("")
