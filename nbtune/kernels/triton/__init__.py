"""Triton twins of the kernels, for CUDA tensors. Triton is no dependency: without it the eager forms run there too."""

from __future__ import annotations

import functools
import importlib.util

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def use_triton(x: Tensor) -> bool:
    """Whether to take the twin: the tensor is on a CUDA device, stored in at most 32 bits, and Triton is installed."""
    return x.is_cuda and x.element_size() <= 4 and _installed()


def launches(x: Tensor) -> bool:
    """Whether there is something to compute. Fake tensors have no memory: a plan only counts what a twin allocates."""
    return x.numel() > 0 and not isinstance(x, FakeTensor)
