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
    the descendants are killed.
    """
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        if created is not None and abs(first.create_time() - created) > 1:
            return
        family = first.children(recursive=True)
        if pid != os.getpid():
            family.insert(0, first)
        for process in family:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.name == "posix" and os.getpgid(process.pid) == process.pid:
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
        psutil.wait_procs(family, timeout=WAIT_SECONDS)
