"""Triton kernels where there is no GPU: in a process of their own, since Triton decides at its import who runs them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Call it with a function of a test module and its arguments: it runs where kernels are interpreted on the CPU."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_INTERPRET", "1")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(int).result()  # the process is started by the first call
        patch.undo()
        yield lambda function, *arguments: pool.submit(function, *arguments).result()
