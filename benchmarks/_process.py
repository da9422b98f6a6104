"""A process for each side of a benchmark: its rounds, its memory; and the machine's rate at matrix products."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import platform
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

Values = Mapping[str, Any]  # what a round came to: plain numbers, strings and lists


@dataclass(frozen=True)
class Side:
    """A name, a generator function that a child process can import, and its arguments."""

    name: str
    run: Callable[..., Iterator[Values]]
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Rounds:
    """One side in this process."""

    def __init__(self, side: Side, device: str) -> None:
        self.name = side.name
        self._device = device
        self._memory = _Memory(device)
        self._work = side.run(**side.arguments)

    def ready(self) -> tuple[int, Values]:
        """Wait until the side is prepared; the bytes it holds then, and what it tells."""
        values = next(self._work)
        _trim_heap()
        return self._memory.used(), values

    def round(self) -> tuple[float, int, Values]:
        """Seconds, peak bytes and what the round came to."""
        self._memory.restart()
        start = time.perf_counter()
        values = next(self._work)
        synchronize(self._device)
        return time.perf_counter() - start, self._memory.peak(), values

    def close(self) -> None:
        """Nothing to end."""


class Child:
    """One side in a process of its own, which works only while it is asked to."""

    def __init__(self, side: Side, device: str, threads: int | None) -> None:
        self.name = side.name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, side, device, threads))
        self._process.start()
        theirs.close()

    def ready(self) -> tuple[int, Values]:
        """See `Rounds.ready`."""
        return self._receive()

    def round(self) -> tuple[float, int, Values]:
        """See `Rounds.round`."""
        self._pipe.send("round")
        return self._receive()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.terminate()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join(30)
            raise RuntimeError(f"{self.name} ended with exit code {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise RuntimeError(f"{self.name} failed:\n{answer}")
        return answer


def _serve(pipe: Connection, side: Side, device: str, threads: int | None) -> None:
    """Run in the child: one answer when ready, one a round, the text of an error where one is raised."""
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        rounds = Rounds(side, device)
        pipe.send(rounds.ready())
        while True:
            try:
                pipe.recv()
            except EOFError:
                break
            pipe.send(rounds.round())
    except BaseException:  # noqa: BLE001 - told to the parent, which raises it, if it is still there
        with suppress(BrokenPipeError):
            pipe.send(traceback.format_exc())
    os._exit(0)  # a paced trainer's thread still waits for a round that will not come


class _Memory:
    """What this process holds: RSS on a CPU, what torch has allocated on a GPU."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._sampled = 0
        if device == "cpu" and not _STATUS.exists():
            threading.Thread(target=self._sample, daemon=True).start()

    def used(self) -> int:
        if self._device != "cpu":
            return torch.cuda.memory_allocated()
        return _status("VmRSS") if _STATUS.exists() else _rss()

    def restart(self) -> None:
        if self._device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        elif _STATUS.exists():
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again from VmRSS
        self._sampled = 0

    def peak(self) -> int:
        if self._device != "cpu":
            return torch.cuda.max_memory_allocated()
        return _status("VmHWM") if _STATUS.exists() else max(self._sampled, _rss())

    def _sample(self) -> None:
        while True:
            self._sampled = max(self._sampled, _rss())
            time.sleep(0.005)


_STATUS = Path("/proc/self/status")


def _status(name: str) -> int:
    """Bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())
    assert found is not None
    return 1024 * int(found[1])


def _rss() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def _trim_heap() -> None:
    """What loading left behind is not the loaded model."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def matrix_rate(dtype: str, device: str = "cpu", seconds: float = 0.05) -> float:
    """FLOP/s of matrix products, the best of a small language model's own shape and of a large square."""
    shapes = [(1024, 576, 1536), (2048, 2048, 2048)] if device == "cpu" else [(8192, 8192, 8192)]
    return max(_rate(*shape, getattr(torch, dtype), device, seconds) for shape in shapes)


def _rate(m: int, k: int, n: int, dtype: torch.dtype, device: str, seconds: float) -> float:
    left, right = torch.randn(m, k, dtype=dtype, device=device), torch.randn(n, k, dtype=dtype, device=device)
    out = torch.mm(left, right.T)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        synchronize(device)
        start = time.perf_counter()
        torch.mm(left, right.T, out=out)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * m * k * n / best
