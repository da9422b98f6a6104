"""The lives of processes: one that ends with the one that started it, and the end of a whole family."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress

import psutil

WAIT_SECONDS = 10.0


def kill_family(pid: int, *, created: float | None = None) -> None:
    """Kill the process `pid`, all its descendants and their process groups, and wait until they are gone.

    Jupyter starts a kernel in a session of its own, so one process group would not hold them all. With `created`, the
    time at which it began, another process that got the same number later is left alone. If it is this process, only
    the descendants are killed. A child of this process is left to be waited for.
    """
    try:
        first = psutil.Process(pid)
        if created is not None and abs(first.create_time() - created) > 1:
            return
        family = first.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    if pid != os.getpid():
        family.insert(0, first)
    others = []
    for process in family:
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            # Who started a process waits for it itself: its exit status is told only once.
            others += [process] if process.ppid() != os.getpid() else []
            if os.name == "posix" and os.getpgid(process.pid) == process.pid:
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
    psutil.wait_procs(others, timeout=WAIT_SECONDS)


def end_with_parent() -> None:
    """From now on, end this process and its descendants when standard input closes.

    It does so with the process that holds its other end, even where that was killed.
    """
    threading.Thread(target=_wait_and_end, name="nbtune-parent", daemon=True).start()


def _wait_and_end() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    kill_family(os.getpid())
    os.kill(os.getpid(), signal.SIGKILL if os.name == "posix" else signal.SIGTERM)


def cores() -> int:
    """The cores that this process may use."""
    return len(psutil.Process().cpu_affinity()) if sys.platform == "linux" else os.cpu_count() or 1


def threads_each(count: int) -> int:
    """How many threads each of `count` processes computes with on this machine."""
    return at_most_wanted(max(1, cores() // count))


def at_most_wanted(threads: int) -> int:
    """So many threads, or fewer where `OMP_NUM_THREADS` says so."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(threads, int(wanted)) if wanted.isdecimal() else threads
