"""The memory that this process holds, now and at most (VRAM on a GPU, resident memory on a CPU), and its device."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import threading
from pathlib import Path
from types import TracebackType

import psutil
import torch

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE_BYTES = 4 << 20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def used_bytes(device: torch.device) -> int:
    """Bytes allocated on a CUDA `device`, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def wait_for(device: torch.device) -> None:
    """Return when the device has done what it was told, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give the memory of a finished run back to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Give the pages between live blocks back to the system, where the C library is glibc.

    Rows differ in length, so freed activations leave holes that the next row's do not fit: without this a process grows
    by a third within 20 steps. Pages that are given back are faulted in again, 5 to 10 % of the time of a step.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def map_large_blocks() -> None:
    """From now on, have each large block of this process in pages of its own, where the C library is glibc.

    glibc keeps the blocks of up to 32 MiB in its heap once such a one has been freed (man 3 mallopt). Weights that are
    gathered block by block leave holes there that no trimming between batches meets: a quarter above the plan.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


class PeakMemory:
    """Follows the peak of `used_bytes` while the block runs.

    CUDA and Linux count it exactly. Elsewhere a thread reads RSS 20 times a second.
    """

    def __init__(self, device: torch.device, interval: float = 0.05) -> None:
        self._device = device
        self._interval = interval
        self._done = threading.Event()
        self._seen = 0
        # Writing 5 there sets the peak that Linux counts back to what is in use (man 5 proc_pid_clear_refs).
        self._counted = device.type == "cpu" and os.access(_CLEAR, os.W_OK)

    @property
    def peak_bytes(self) -> int:
        """The most seen since the block began."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if self._counted:
            line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
            return 1024 * int(line.split()[1])
        self._seen = max(self._seen, used_bytes(self._device))
        return self._seen

    def restart(self) -> None:
        """Forget what was before."""
        self._seen = 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._counted:
            _CLEAR.write_text("5")

    def __enter__(self) -> PeakMemory:
        self.restart()
        if self._device.type == "cpu" and not self._counted:
            threading.Thread(target=self._follow, name="nbtune-memory", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()

    def _follow(self) -> None:
        while not self._done.wait(self._interval):
            self._seen = max(self._seen, used_bytes(self._device))
