"""plan_together(specs): what it takes to train several runs on one base model, and when that is faster.

What is shared is loaded once: the interpreter, its libraries, the base weights, the data. And a forward and backward
pass costs something whatever is in it (the calls of some hundred modules, weights read from memory and laid out for
the products), which one pass for several runs pays once. Long micro-batches keep the device busy by themselves: those
gain nothing but the loading.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from nbtune.models import default_device
from nbtune.plan import HEAP_SHARE, ROOM, Plan, format_bytes, plan
from nbtune.spec import RunSpec, TrainingSpec

# Tokens of a pass from which on more of them save nothing, and what a pass costs beside its products.
# Measured by benchmarks/together.py; see docs/measurements.md.
PASS_TOKENS = {"cpu": 2048, "cuda": 16384}
BLOCK_SECONDS = {"cpu": 0.010, "cuda": 0.002}  # of a pass, for each block of the model
STARTUP_SECONDS = 18.0  # of a process, until it trains: the interpreter, libraries, checks, plan, data
LOADED_BYTES_A_SECOND = 0.5e9  # of base weights


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """What a group of runs will need on one base, and how it is laid out."""

    specs: tuple[RunSpec, ...]
    plans: tuple[Plan, ...]  # of each run, beside the adapters of the others
    whole: Plan  # of all together; its layout is that of the largest
    width: int  # runs whose micro-batches go through the base in one pass
    seconds: float | None  # of all of it, loading included; None where the number of steps depends on the data
    alone_seconds: float | None  # of one run after the other, each in a process of its own

    @property
    def fits(self) -> bool:
        return self.whole.fits

    @property
    def ratio(self) -> float | None:
        """The time together over the time of one after the other; less than 1 is faster."""
        return None if self.seconds is None or not self.alone_seconds else self.seconds / self.alone_seconds

    def training(self, number: int) -> TrainingSpec:
        """The settings of a run, with its micro-batches as planned."""
        planned = self.plans[number]
        layout = {
            "per_device_train_batch_size": planned.micro_batch_size,
            "gradient_accumulation_steps": planned.accumulation,
        }
        return self.specs[number].training.model_copy(update=layout)

    def __str__(self) -> str:
        passes = f"{self.width} in a pass" if self.width > 1 else "one in a pass"
        text = f"{len(self.specs)} runs on one base, {passes}: {format_bytes(self.whole.peak_bytes)}"
        if self.ratio is None:
            return text
        return f"{text}, {self.ratio:.2f} of the time of one after the other"


def plan_together(
    specs: Sequence[RunSpec],
    *,
    available_bytes: int | None = None,
    in_new_process: bool = False,
    alone: Sequence[Plan] | None = None,
) -> GroupPlan:
    """Predict memory and time of runs that share a base model, and choose how many go through it at once.

    `alone` are their plans, where they are known; the other arguments are those of `plan`. Raises what `plan` raises.
    """
    options = {"in_new_process": in_new_process}
    first = alone or [plan(spec, available_bytes=available_bytes, **options) for spec in specs]
    available = first[0].available_bytes
    # Whatever a run is at, the adapters of the others are there too; where that is too much, it is laid out smaller.
    beside = [sum(map(_held, first)) - _held(planned) for planned in first]
    plans = tuple(
        planned
        if planned.peak_bytes + held <= ROOM * available
        else plan(spec, available_bytes=available - held, **options)
        for spec, planned, held in zip(specs, first, beside, strict=True)
    )
    checkpointed = max(planned.checkpointed_layers for planned in plans)
    widths = range(1 if checkpointed else _most(specs, plans), 0, -1)
    width = next((width for width in widths if _peak(plans, width) <= ROOM * available), 1)
    whole = dataclasses.replace(
        max(plans, key=lambda planned: planned.peak_bytes),
        parts=_parts(plans, width),
        available_bytes=available,
        checkpointed_layers=checkpointed,
        trained_parameters=sum(planned.trained_parameters for planned in plans),
        seconds=_total([planned.seconds for planned in plans]),
    )
    return GroupPlan(tuple(specs), plans, whole, width, _seconds(specs, plans, width), _seconds_alone(specs, first))


def _held(planned: Plan) -> int:
    """Bytes that a run holds on to while others are computed."""
    return sum(planned.parts[name] for name in ("adapter", "gradients", "optimiser"))


def _parts(plans: Sequence[Plan], width: int) -> dict[str, int]:
    """Bytes by part at the peak of a pass with the `width` largest runs."""
    parts = {name: sum(planned.parts[name] for planned in plans) for name in ("adapter", "gradients", "optimiser")}
    largest = sorted((planned.parts["activations"] for planned in plans), reverse=True)[:width]
    return {
        "base weights": max(planned.parts["base weights"] for planned in plans),
        **parts,
        "activations": sum(largest),
        "loss": max(planned.parts["loss"] for planned in plans),  # one run's after the other's
        "overhead": max(planned.parts["overhead"] for planned in plans) + int(HEAP_SHARE * sum(largest[1:])),
    }


def _peak(plans: Sequence[Plan], width: int) -> int:
    return sum(_parts(plans, width).values())


def _most(specs: Sequence[RunSpec], plans: Sequence[Plan]) -> int:
    """The most runs of a pass, as far as that saves time: until it has tokens enough to keep the device busy."""
    enough = PASS_TOKENS[default_device().type]
    tokens = sorted(
        planned.micro_batch_size * (spec.training.max_length + spec.virtual_tokens)
        for spec, planned in zip(specs, plans, strict=True)
    )
    return max([1, *(count for count in range(1, len(tokens) + 1) if sum(tokens[:count]) <= enough)])


def _seconds(specs: Sequence[RunSpec], plans: Sequence[Plan], width: int) -> float | None:
    work = _total([planned.seconds for planned in plans])
    if work is None:
        return None
    left = [spec.training.max_steps * planned.accumulation for spec, planned in zip(specs, plans, strict=True)]
    passes, done = 0, 0
    for until in sorted(set(left)):  # the runs that are left go through the base together
        running = sum(count >= until for count in left)
        passes += -(-running // width) * (until - done)
        done = until
    return _loading(plans[0]) + passes * _pass_seconds(plans[0]) + work


def _seconds_alone(specs: Sequence[RunSpec], plans: Sequence[Plan]) -> float | None:
    each = [_seconds([spec], [planned], 1) for spec, planned in zip(specs, plans, strict=True)]
    return _total(each)


def _loading(planned: Plan) -> float:
    return STARTUP_SECONDS + planned.parts["base weights"] / LOADED_BYTES_A_SECOND


def _pass_seconds(planned: Plan) -> float:
    """What a pass costs beside its products."""
    return planned.layers * BLOCK_SECONDS[default_device().type]


def _total(seconds: Sequence[float | None]) -> float | None:
    known = [value for value in seconds if value is not None]
    return sum(known) if len(known) == len(seconds) else None
