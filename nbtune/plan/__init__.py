"""plan(spec): how much memory a run will take, by part, and how long, before anything is loaded.

The model's shapes are read on torch's meta device. On a CPU the peak is that of the whole process (RSS), so it holds
the interpreter and its libraries too; on a GPU it is what torch allocates.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbtune.spec import RunSpec

if TYPE_CHECKING:
    import torch

    from nbtune.models import ModelInfo

# Python with torch, transformers, datasets, accelerate and MLflow imported; measured, see docs/measurements.md.
LIBRARIES_BYTES = 1_250_000_000
# What the C library's heap holds beyond the activations, in which blocks of many sizes come and go; measured on Linux.
HEAP_SHARE = 1.05
# What CUDA's caching allocator and workspaces hold beyond the tensors.
CUDA_SHARE = 0.1
# Share of the machine's matrix rate that a whole step reaches; the rest is attention, norms and copies. Measured.
EFFICIENCY = 0.45


@dataclass(frozen=True)
class Plan:
    """What a run will need."""

    parts: dict[str, int]  # bytes
    tokens_per_step: int
    seconds: float | None  # of all steps; None where their number depends on the data
    available_bytes: int  # memory that is free for it now

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in self.parts.items() if size)
        duration = f", about {format_seconds(self.seconds)}" if self.seconds is not None else ""
        return f"{format_bytes(self.peak_bytes)}{duration} ({parts})"


def plan(spec: RunSpec) -> Plan:
    """Predict the memory and the time of `spec` on this machine. Raises ModelError where the model is not known."""
    from nbtune.models import available_memory, compute_dtype, default_device, describe

    info = describe(spec.model)
    device = default_device()
    compute = compute_dtype(spec.model.dtype, device)
    trained = _trained_parameters(spec, info)
    full = spec.method == "full"
    weight_bytes = 4 if full and spec.model.dtype == "auto" else compute.itemsize

    training = spec.training
    tokens = training.per_device_train_batch_size * (training.max_length + spec.virtual_tokens)
    parts = {
        "base weights": info.weight_bytes(weight_bytes, spec.model.quantised_bytes),
        "adapter": 0 if full else trained * 4,
        "gradients": trained * 4,
        "optimiser": trained * 8,  # AdamW: two fp32 averages
        "activations": _activation_bytes(spec, info, tokens, compute),
        "loss": _loss_bytes(info, tokens, compute, full),
    }
    if device.type == "cpu":
        parts["overhead"] = LIBRARIES_BYTES + int(HEAP_SHARE * parts["activations"])
    else:
        parts["overhead"] = int(CUDA_SHARE * sum(parts.values()))

    tokens_per_step = tokens * training.gradient_accumulation_steps
    seconds = None
    if training.max_steps > 0:
        # Forward 2 FLOPs a parameter and token, backward to the inputs 2, to the weights 2 where they are trained.
        flops = training.max_steps * tokens_per_step * info.parameters * (6 if full else 4)
        seconds = flops / (EFFICIENCY * matrix_rate(device, compute))
    return Plan(parts, tokens_per_step, seconds, available_memory(device))


def _trained_parameters(spec: RunSpec, info: ModelInfo) -> int:
    if spec.method == "full":
        return info.parameters
    from nbtune.models import attach_adapter, skeleton

    adapted = attach_adapter(skeleton(spec.model), spec)
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def _activation_bytes(spec: RunSpec, info: ModelInfo, tokens: int, dtype: torch.dtype) -> int:
    """What the forward pass keeps for the backward pass.

    Per token and block: the output of every projection but the two that end on the residual stream, the activation and
    its product, the inputs of the adapters, and two fp32 copies of the hidden state for the norms. With gradient
    checkpointing only the input of each block is kept, and one block at a time is recomputed.
    """
    blocks = max(info.layers, 1)
    in_blocks = [module for module in info.modules if module.layer is not None]
    projected = sum(module.out_features for module in in_blocks) / blocks
    widest = max((module.out_features for module in in_blocks), default=info.hidden_size)
    kept = dtype.itemsize * (projected + 2 * info.hidden_size + 2 * widest) + 8 * info.hidden_size  # bytes a token
    if spec.training.gradient_checkpointing:
        return int(tokens * (blocks * dtype.itemsize * info.hidden_size + 2 * kept))
    return int(tokens * blocks * kept)


def _loss_bytes(info: ModelInfo, tokens: int, dtype: torch.dtype, full: bool) -> int:
    """The chunk of logits (as matrix product, in fp32, and as gradient) and the gradient of the hidden states."""
    from nbtune.kernels.linear_cross_entropy import CHUNK_BYTES

    chunk = min(CHUNK_BYTES, 4 * tokens * info.vocabulary)
    head_gradient = 2 * 4 * info.vocabulary * info.hidden_size if full else 0
    return int(chunk * (1 + 2 * dtype.itemsize / 4)) + 2 * tokens * info.hidden_size * dtype.itemsize + head_gradient


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of matrix products on `device` in `dtype`, measured for some tens of milliseconds."""
    import torch

    a = torch.randn(size, size, device=device, dtype=dtype)
    torch.mm(a, a)  # the first call sets kernels up
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def format_bytes(size: float) -> str:
    """`1.6 GB`, `23 MB`: two figures, decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"


def format_seconds(seconds: float) -> str:
    """`48 s`, `4 min`, `1 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
