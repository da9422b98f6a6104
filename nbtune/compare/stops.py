"""Ending what a visitor has asked for, while it is being written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gradio as gr


class Stops:
    """One per page. A session asks for one thing at a time: all of them wait in the model's queue."""

    def __init__(self) -> None:
        self._events: dict[str, threading.Event] = {}

    @contextmanager
    def listening(self, request: gr.Request) -> Iterator[Callable[[], bool]]:
        """Yields what says whether this session wants an end."""
        session = request.session_hash or ""
        event = self._events[session] = threading.Event()
        try:
            yield event.is_set
        finally:
            self._events.pop(session, None)

    def end(self, request: gr.Request) -> None:
        """End what is being written for this session."""
        event = self._events.get(request.session_hash or "")
        if event is not None:
            event.set()

    def end_all(self) -> None:
        for event in tuple(self._events.values()):
            event.set()
