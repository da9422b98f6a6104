"""What this machine has: the device, the memory that is free on it, and the precision it computes well."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_CGROUP = Path("/sys/fs/cgroup")  # version 2; a container's limit is not in the machine's own figures


def default_device() -> torch.device:
    """This thread's CUDA device, the first unless a process of several has another; else the CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0)


def compute_dtype(name: str, device: str | torch.device) -> torch.dtype:
    """The precision for `name` on `device`; "auto" is bfloat16 where its arithmetic is in hardware, else float32."""
    import torch

    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
    return torch.bfloat16 if _has_bfloat16(torch.device(device)) else torch.float32


def _has_bfloat16(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def available_memory(device: str | torch.device) -> int:
    """Bytes that a process may still take on `device`; on the CPU no more than its container allows."""
    import psutil
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit = _container_headroom()
    return free if limit is None else min(free, limit)


def _container_headroom() -> int | None:
    """Bytes below the container's limit, not counting the file cache it can drop; None where there is no limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except FileNotFoundError:  # not Linux, or no container
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - used + int(statistics.get("inactive_file", 0)))


def missing_compiler(device: str | torch.device) -> str | None:
    """What torch.compile would need on `device` and this machine has not; None where it has all."""
    import torch

    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch chooses it
    if shutil.which(compiler) is None:
        return f"the C++ compiler {compiler}"
    if torch.device(device).type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton"
    return None
