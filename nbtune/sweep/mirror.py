"""A folder on another machine, mirrored here while it grows: events and notebooks at once, large files at the end.

    sender = Sender(there, names=["001.ipynb", "runs"], renamed={"/tmp/x/sweep": "/home/me/sweeps/a"})
    receiver = Receiver(here)
    receiver.take(sender.look())

What was a path there is written as what it is here.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from filelock import FileLock

from nbtune import _files
from nbtune.errors import SweepError

Facts = tuple[int, int, int]  # inode, bytes, time of the last change in ns

GROWING = (".jsonl", ".log", "log.txt")  # only ever appended to, line by line
TEXT = (".yaml", ".json", ".ipynb", ".md", ".txt", ".csv", *GROWING)
SMALL = 2**20  # bytes: what is larger waits for the end, unless it grows by lines
CHUNK = 2**24  # bytes
BUDGET = 2**25  # bytes that one look brings, more or less
APART = ("mlflow.db", "mlartifacts", "mlruns")  # of a store of its own, which every machine has for itself


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a file: the next lines of one that grows, or a chunk of one that is replaced as a whole."""

    path: str  # below the folder
    data: bytes
    grows: bool
    first: bool
    last: bool = True


@dataclasses.dataclass(frozen=True)
class Look:
    """What is new."""

    folders: Sequence[str] = ()
    pieces: Sequence[Piece] = ()
    gone: Sequence[str] = ()
    more: bool = False  # though nothing changes any more


class Sender:
    """Tells what is new below `names` in a folder since it was asked last."""

    def __init__(self, folder: Path, names: Sequence[str], renamed: Mapping[str, str]) -> None:
        self._folder, self._names = folder, names
        self._renamed = [(old.encode(), new.encode(), json.dumps(new)[1:-1].encode()) for old, new in renamed.items()]
        self._sent: dict[str, Facts] = {}
        self._offsets: dict[str, int] = {}  # bytes sent: of files that grow, and of those that go in chunks
        self._due: dict[str, Facts] = {}  # files that are not sent as they are now
        self._folders: set[str] = set()

    def look(self, *, final: bool = False) -> Look:
        """`final` once nothing is written any more: then all of it comes, however large."""
        folders, files = self._found()
        gone = [path for path in self._sent if path not in files]
        for path in gone:
            del self._sent[path]
            self._offsets.pop(path, None)
        self._due = {path: facts for path, facts in files.items() if self._is_due(path, facts, final=final)}
        new = [folder for folder in folders if folder not in self._folders]
        self._folders.update(new)
        pieces = self._pieces(final=final)
        return Look(new, pieces, gone, more=bool(self._due))

    def forget(self) -> None:
        """Tell all of it again: an answer was lost on its way."""
        for known in (self._sent, self._offsets, self._folders):
            known.clear()

    def told(self, text: str) -> str:
        """A text with its paths as they are where it goes."""
        return self._renamed_in(text.encode(), "").decode()

    def _found(self) -> tuple[list[str], dict[str, Facts]]:
        """What is to be mirrored; never names that begin with a dot: locks, wishes, and files half written."""
        folders: list[str] = []
        files: dict[str, Facts] = {}
        for root in (self._folder / name for name in self._names):
            if root.is_file():
                files[root.name] = _facts(root)
            for folder, names, found in os.walk(root):
                names[:] = sorted(name for name in names if not name.startswith(".") and name not in APART)
                folders.append(Path(folder).relative_to(self._folder).as_posix())
                for file in (Path(folder) / name for name in sorted(found) if not name.startswith((".", APART[0]))):
                    with suppress(FileNotFoundError):  # a checkpoint that made room for the next
                        if not file.is_symlink() and not _is_of_a_store_there(file):
                            files[file.relative_to(self._folder).as_posix()] = _facts(file)
        return folders, files

    def _is_due(self, path: str, facts: Facts, *, final: bool) -> bool:
        if path.endswith(GROWING):
            return self._sent.get(path) != facts or (final and self._offsets[path] < facts[1])
        return self._sent.get(path) != facts and (final or facts[1] <= SMALL)

    def _pieces(self, *, final: bool) -> list[Piece]:
        pieces: list[Piece] = []
        size = 0
        while self._due and size < BUDGET:
            path, facts = next(iter(self._due.items()))
            piece = self._grown(path, facts, final=final) if path.endswith(GROWING) else self._chunk(path, facts)
            pieces.append(piece)
            size += len(piece.data)
            if piece.last:
                del self._due[path]
                self._sent[path] = facts
        return pieces

    def _grown(self, path: str, facts: Facts, *, final: bool) -> Piece:
        """The lines since the last look."""
        offset, known = self._offsets.get(path, 0), self._sent.get(path)
        if known is None or known[0] != facts[0] or facts[1] < offset:
            offset = 0
        with (self._folder / path).open("rb") as lines:
            lines.seek(offset)
            data = lines.read()
        end = len(data) if final else data.rfind(b"\n") + 1
        self._offsets[path] = offset + end
        return Piece(path, self._renamed_in(data[:end], path), grows=True, first=offset == 0)

    def _chunk(self, path: str, facts: Facts) -> Piece:
        file = self._folder / path
        if path.endswith(TEXT) and facts[1] <= BUDGET:
            return Piece(path, self._renamed_in(file.read_bytes(), path), grows=False, first=True)
        offset = self._offsets.pop(path, 0)
        with file.open("rb") as data:
            data.seek(offset)
            chunk = data.read(CHUNK)
        last = not chunk or offset + len(chunk) >= facts[1]
        if not last:
            self._offsets[path] = offset + len(chunk)
        return Piece(path, chunk, grows=False, first=offset == 0, last=last)

    def _renamed_in(self, data: bytes, path: str) -> bytes:
        for old, new, escaped in self._renamed:
            data = data.replace(old, escaped if path.endswith((".json", ".jsonl", ".ipynb")) else new)
        return data


def _facts(file: Path) -> Facts:
    stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _is_of_a_store_there(file: Path) -> bool:
    """Whether this says which run of MLflow it is, of a database that only that machine has."""
    return file.name == "mlflow.json" and not json.loads(file.read_text())["tracking_uri"].startswith("http")


class Receiver:
    """Writes what a `Sender` tells into a folder. Runs are locked as long as they may go on, as by who trains them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._locks: dict[Path, FileLock] = {}

    @property
    def runs(self) -> list[Path]:
        return list(self._locks)

    def take(self, look: Look) -> None:
        """Raises SweepError where a path leads out of the folder, OSError where the disk is full."""
        for folder in look.folders:
            self._path(folder).mkdir(parents=True, exist_ok=True)
            self._lock(PurePosixPath(folder))
        for piece in look.pieces:
            self._write(piece)
        for name in look.gone:
            self._path(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Let the runs go."""
        for lock in self._locks.values():
            lock.release()
        self._locks.clear()

    def _lock(self, folder: PurePosixPath) -> None:
        if len(folder.parts) > 1 and folder.parts[0] == "runs":
            run = self._folder / "runs" / folder.parts[1]
            if run not in self._locks:
                self._locks[run] = FileLock(run / ".lock", thread_local=False)
                self._locks[run].acquire(timeout=5)

    def _write(self, piece: Piece) -> None:
        path = self._path(piece.path)
        if piece.grows:
            with path.open("wb" if piece.first else "ab") as file:
                file.write(piece.data)
        elif piece.first and piece.last:
            _files.write_bytes(path, piece.data)
        else:
            part = path.with_name(f".{path.name}.part")
            with part.open("wb" if piece.first else "ab") as file:
                file.write(piece.data)
            if piece.last:
                _files.put_in_place(part, path)

    def _path(self, name: str) -> Path:
        parts = PurePosixPath(name).parts
        if PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name:
            raise SweepError(f"A trial sent a file that is called {name}", "It would lie outside of the sweep.")
        return self._folder.joinpath(*parts)
