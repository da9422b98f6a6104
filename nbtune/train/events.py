"""`events.jsonl`: what happened in a run, one JSON object a line, only ever appended to.

The table of event types is in docs/architecture.md.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

Event = dict[str, Any]
FILE = "events.jsonl"


class EventLog:
    """Appends events to a folder's file; each line is on its way to the disk before `append` returns."""

    def __init__(self, folder: Path, *, file: str = FILE) -> None:
        mend(folder, file=file)
        self._file = (folder / file).open("a", encoding="utf-8", buffering=1)

    def append(self, event: Event) -> Event:
        """Write `event` with the time it happened; returns it as written."""
        event = {"time": round(time.time(), 3), **{key: _plain(value) for key, value in event.items()}}
        self._file.write(json.dumps(event, ensure_ascii=False) + "\n")
        return event

    def close(self) -> None:
        self._file.close()


def read_events(run_path: Path, *, all_lives: bool = False) -> list[Event]:
    """The events of the run at `run_path`, oldest first.

    After a resume, the steps of the earlier life past the checkpoint no longer count and are left out; `all_lives`
    keeps them, in the order in which they were written. A last line without its end, as a kill leaves it, is not read.
    """
    events, _ = _read_from(run_path / FILE, 0)
    return events if all_lives else _living(events)


class EventReader:
    """Reads the events of what goes on in a folder, as `read_events` does; a look parses only what is new."""

    def __init__(self, folder: Path, *, file: str = FILE) -> None:
        self._file = folder / file
        self._read: tuple[int, list[Event]] = (0, [])  # bytes, and the events in them; replaced whole: threads share it

    def read(self) -> list[Event]:
        """The events so far; the same list as before where there is nothing new."""
        offset, events = self._read
        new, offset = _read_from(self._file, offset)
        if new:
            events = [*events, *new]
            self._read = offset, _living(events) if any(event["type"] == "resume" for event in new) else events
        return self._read[1]


def _read_from(file: Path, offset: int) -> tuple[list[Event], int]:
    """The events after `offset` bytes, in whole lines, and where the next ones will begin."""
    if not file.exists() or file.stat().st_size == offset:
        return [], offset
    with file.open("rb") as lines:
        lines.seek(offset)
        data = lines.read()
    end = data.rfind(b"\n") + 1
    return [json.loads(line) for line in data[:end].split(b"\n")[:-1]], offset + end


def _living(events: list[Event]) -> list[Event]:
    """Events without the steps that a later `resume` did again."""
    living: list[Event] = []
    for event in events:
        if event["type"] == "resume":
            done = event["step"]  # steps whose work the resumed life starts from; none: it starts anew
            living = [old for old in living if done and old.get("step", 0) <= done and old["type"] != "end"]
        living.append(event)
    return living


def mend(folder: Path, *, file: str = FILE) -> None:
    """Cut off what follows the last line end, so that the next event starts on a line of its own."""
    path = folder / file
    if not path.exists():
        return
    with path.open("r+b") as lines:
        data = lines.read()
        lines.truncate(data.rfind(b"\n") + 1)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity; they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
