"""plan(spec): how much memory a run will take, by part, how long it takes, and what fits, before anything is loaded.

The model's shapes are read on torch's meta device, and a step of it is traced on tensors without memory (`trace`). On a
CPU the peak is that of the whole process (RSS), so it holds the interpreter and its libraries too; on a GPU it is what
torch allocates.

Where the memory there is does not do, the plan first makes micro-batches smaller as long as they keep the device busy,
then computes as many blocks again as it must, then makes them smaller still. Rows a step, and so its result, stay.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from nbtune.spec import RunSpec

if TYPE_CHECKING:
    import torch

    from nbtune.plan.memory import Peak, Step
    from nbtune.plan.model import Weights

# What is measured, on Linux; `benchmarks/plan.py --fit` prints new values. See docs/measurements.md.
LIBRARIES_BYTES = 890_000_000  # Python with torch, transformers, accelerate and datasets, a tokenizer, rows
BITSANDBYTES_BYTES = 120_000_000
MLFLOW_BYTES = 110_000_000  # with its database
ROWS_BYTES = 40_000_000  # of it, what comes after the plan of a run: the tokenizer and the rows
HEAP_SHARE = 0.3  # of a step's most activations: what the C library's heap holds beyond tensors, in holes they left
CUDA_SHARE = 0.1  # of all tensors: what CUDA's caching allocator and workspaces hold beyond them
EFFICIENCY = 0.45  # share of the machine's matrix rate that a whole step reaches

SHARDED_OPTIMISERS = ("adamw_torch_fused",)  # that take sharded weights
ROOM = 0.95  # of the memory there is, that a plan may fill
BUSY_TOKENS = {"cpu": 512, "cuda": 4096}  # micro-batches of so many keep the device as busy as larger ones


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will need, and how it is laid out to fit."""

    parts: dict[str, int]  # bytes, at the moment of the peak
    tokens_per_step: int
    seconds: float | None  # of all steps; None where their number depends on the data
    available_bytes: int  # memory that there is for it: what is free, and what this process has
    micro_batch_size: int  # rows in one forward pass
    accumulation: int  # forward passes a step
    checkpointed_layers: int  # of the first blocks, computed again in the backward pass
    layers: int
    packing_length: int  # tokens of the flat row that a micro-batch is; no example in it sees another
    trained_parameters: int
    traced: bool  # whether the activations were counted; else estimated from the model's sizes
    chosen: str = ""  # how this differs from what the spec says, and why; "" where it does not
    processes: int = 1  # that share the passes of a step; the bytes are those of each
    sharded: bool = False  # whether each of them keeps a share of the weights

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.available_bytes

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in self.parts.items() if size)
        duration = f", about {format_seconds(self.seconds)}" if self.seconds is not None else ""
        parts += "" if self.traced else "; activations estimated"
        parts += f"; each of {self.processes} processes" if self.processes > 1 else ""
        chosen = f"; {self.chosen}" if self.chosen else ""
        return f"{format_bytes(self.peak_bytes)}{duration} ({parts}){chosen}"


def plan(spec: RunSpec, *, available_bytes: int | None = None, in_new_process: bool = False) -> Plan:
    """Predict the memory and the time of `spec` on this machine, and choose what fits.

    `available_bytes` is the memory there is for the process; None is what is free, and what this process has already,
    unless the run is to be in a new one. A run on several processes is in new ones, with equal shares of a machine's
    memory, or a GPU each.

    Raises ModelError where the model is not known, AdapterError where the method does not fit it.
    """
    from nbtune.models import compute_dtype, default_device
    from nbtune.plan.model import weigh

    device = default_device()
    dtype = compute_dtype(spec.model.dtype, device)
    training, processes = spec.training, spec.training.num_processes
    held, available = _memory(device)
    if in_new_process or processes > 1:
        held, available = 0, available - held
    if device.type == "cpu":
        available //= processes
    available = available if available_bytes is None else available_bytes
    whole = weigh(spec, device)
    libraries = _libraries(spec, whole, held)
    layout, fitting = None, None
    for sharded in shardings(spec):
        weights = whole.sharded(processes, every_weight=spec.method == "full") if sharded else whole
        for layout in _layouts(spec, device, weights, sharded=sharded):
            if sum(_parts(layout, device, libraries).values()) <= ROOM * available:
                fitting = layout
                break
        if fitting is not None:
            break
    assert layout is not None
    chosen = fitting or layout  # the last is the smallest
    seconds = None
    if training.max_steps > 0:
        # Processes on a CPU share its rate; each GPU has its own.
        passes = chosen.passes if device.type == "cuda" else chosen.accumulation
        flops = training.max_steps * passes * chosen.step.flops(chosen.checkpointed)
        seconds = flops / (EFFICIENCY * matrix_rate(device, dtype))
    row = training.max_length + spec.virtual_tokens
    return Plan(
        parts=_parts(chosen, device, libraries),
        tokens_per_step=chosen.rows * chosen.accumulation * row,
        seconds=seconds,
        available_bytes=available,
        micro_batch_size=chosen.rows,
        accumulation=chosen.accumulation,
        checkpointed_layers=chosen.checkpointed,
        layers=chosen.step.blocks,
        packing_length=chosen.rows * row if training.packing else row,
        trained_parameters=whole.trained,
        traced=chosen.step.traced,
        chosen=_chosen(spec, chosen, fits=fitting is not None),
        processes=processes,
        sharded=chosen.sharded,
    )


def shardings(spec: RunSpec) -> tuple[bool, ...]:
    """Whether weights may be sharded, the wanted way first: `training.sharding`, where there is a choice."""
    setting = spec.training.sharding
    if spec.training.num_processes == 1 or setting == "none":
        return (False,)
    if setting == "full":
        return (True,)
    if spec.method == "full":
        return (spec.training.optim in SHARDED_OPTIMISERS,)
    return (False,) if spec.model.quantised_bytes is not None else (False, True)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """One way to do a step."""

    rows: int  # of a micro-batch
    accumulation: int  # of all processes together
    processes: int
    checkpointed: int
    step: Step
    weights: Weights
    sharded: bool

    @property
    def passes(self) -> int:
        """How many of a step's micro-batches a process has, the one with most."""
        return -(-self.accumulation // self.processes)

    def peak(self) -> Peak:
        return self.step.peak(self.checkpointed, accumulates=self.passes > 1)


def _layouts(spec: RunSpec, device: torch.device, weights: Weights, *, sharded: bool) -> Iterator[_Layout]:
    """All ways to do a step, from the one that the spec asks for to the one that takes the least memory."""
    training, setting = spec.training, spec.training.gradient_checkpointing
    rows = training.per_device_train_batch_size
    processes, steps = training.num_processes, training.gradient_accumulation_steps

    def most_rows(size: int) -> int:
        """Of a process, in a step with micro-batches of this size."""
        return size * -(-steps * (rows // size) // processes)

    divisors = [size for size in range(rows, 0, -1) if rows % size == 0]
    smaller = [size for size in divisors if most_rows(size) == min(map(most_rows, divisors))]
    enough = BUSY_TOKENS[device.type]
    free = [size for size in smaller if size == smaller[0] or size * training.max_length >= enough]

    def layouts(size: int, *, recomputed: bool) -> Iterator[_Layout]:
        step = _step(spec, device, weights, size, recomputed=recomputed)
        accumulation = steps * (rows // size)
        if setting is True:
            counts = range(step.blocks, step.blocks + 1)
        else:  # computing the last block again saves nothing: its activations are needed at once
            counts = range(1, step.blocks) if recomputed else range(1)
        return (_Layout(size, accumulation, processes, count, step, weights, sharded) for count in counts)

    if setting != "auto":
        for size in smaller:
            yield from layouts(size, recomputed=bool(setting))
        return
    for size in free:
        yield from layouts(size, recomputed=False)
    for size in smaller[len(free) - 1 :]:
        yield from layouts(size, recomputed=True)


def _step(spec: RunSpec, device: torch.device, weights: Weights, rows: int, *, recomputed: bool) -> Step:
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    from nbtune.models import compute_dtype, describe
    from nbtune.plan.estimate import estimated_step
    from nbtune.plan.model import step

    if weights.trained:
        with suppress(DataDependentOutputException, DynamicOutputShapeException):
            return step(spec, device, weights, rows, recomputed=recomputed)
    tokens = rows * (spec.training.max_length + spec.virtual_tokens)
    itemsize = compute_dtype(spec.model.dtype, device).itemsize
    return estimated_step(describe(spec.model), weights, tokens, itemsize)


def _libraries(spec: RunSpec, weights: Weights, held: int) -> int:
    """What a process on a CPU will hold beside tensors: what is usual, or what it holds now and what is to come."""
    quantised = BITSANDBYTES_BYTES if weights.dequantised else 0
    mlflow = MLFLOW_BYTES if spec.tracking.mlflow else 0
    to_come = ROWS_BYTES + (0 if "mlflow" in sys.modules else mlflow)
    return max(LIBRARIES_BYTES + quantised + mlflow, held + to_come)


def _parts(layout: _Layout, device: torch.device, libraries: int) -> dict[str, int]:
    """Bytes by part at the moment of the peak."""
    peak, weights = layout.peak(), layout.weights
    parts = {
        "base weights": weights.base,
        "adapter": weights.adapter,
        "gradients": peak.gradients,
        "optimiser": weights.optimiser,
        "activations": peak.activations + weights.dequantised,
        "loss": peak.loss,
    }
    if device.type == "cpu":
        holes = int(HEAP_SHARE * (peak.passed + weights.dequantised))
        parts["overhead"] = libraries + holes
    else:
        parts["overhead"] = int(CUDA_SHARE * sum(parts.values()))
    return parts


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes that this process holds on `device`, and those that it may hold in all."""
    import psutil
    import torch

    from nbtune.models import available_memory

    held = torch.cuda.memory_reserved(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return held, held + available_memory(device)


def _chosen(spec: RunSpec, layout: _Layout, *, fits: bool) -> str:
    """What the plan changed, in words."""
    training, changed = spec.training, []
    if layout.sharded and training.sharding == "auto" and spec.method != "full":
        changed.append(f"weights sharded over {layout.processes} processes")
    if layout.rows != training.per_device_train_batch_size:
        changed.append(f"micro-batches of {layout.rows} x {layout.accumulation}")
    if layout.checkpointed and training.gradient_checkpointing == "auto":
        changed.append(f"{layout.checkpointed} of {layout.step.blocks} layers computed again")
    if not changed:
        return ""
    why = " to fit" if layout.processes == 1 else f" for {layout.processes} processes"
    return " and ".join(changed) + (why if fits else ", which does not suffice")


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
