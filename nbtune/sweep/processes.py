"""The end of processes: a job's whole family, kernel and loaders included."""

from __future__ import annotations

import os
import signal
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
