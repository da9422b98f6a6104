"""The processes that train one run together, as the training loop sees them.

All of them go through the same steps; each takes its share of a step's micro-batches, and the sums make up the step of
one process alone. What is asked in here is asked by all of them, in the same order, or all would wait for each other.
Alone, nothing in here does anything.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nbtune.data import Batch
from nbtune.data.packing import IGNORED
from nbtune.errors import RunError

PATIENCE = "NBTUNE_PATIENCE"  # of the environment: seconds that processes wait for one that does not come
PATIENCE_SECONDS = 600.0
BUCKET_BYTES = 64 * 2**20  # gradients are sent in pieces of about so many
_ROLL_CALL_SECONDS = 2.0


class LostProcessError(RunError):
    """Another process of the run has ended: it is the one that knows why."""


@dataclasses.dataclass(frozen=True)
class World:
    """The `rank`-th of `size` processes, `local_size` of which are on this machine."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    in_step: bool = False  # whether each makes as many passes as the others: sharded weights are gathered in them
    _store: dist.Store | None = None

    @classmethod
    def join(cls) -> World:
        """Meet the others, as torchrun's environment variables say; its own GPU becomes this process's current one.

        The variables are taken out of the environment: others than we (accelerate) would act on them too. Whoever has
        met them already (Ray's workers) stays as it is.
        """
        from torch.distributed.rendezvous import rendezvous

        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank, size, local_rank, local_size = (int(os.environ.pop(name)) for name in names)
        if dist.is_initialized():
            return cls(rank, size, local_size)
        if torch.cuda.is_available():
            torch.cuda.init()
            torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        timeout = timedelta(seconds=patience_seconds())
        store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
        store = dist.PrefixStore("nbtune", store)
        world = cls(rank, size, local_size, _store=store)
        with world._with_the_others():
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        return world

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and says what happens."""
        return self.rank == 0

    def share(self, batches: Sequence[Batch]) -> list[Batch]:
        """What this process does of a step's micro-batches: every `size`-th.

        Where all must be in step and there are too few for all, the rest get one without labels: it changes nothing.
        """
        own = list(batches[self.rank :: self.size])
        if self.in_step and len(own) < -(-len(batches) // self.size):
            own.append(dataclasses.replace(batches[0], labels=torch.full_like(batches[0].labels, IGNORED)))
        return own

    def first_says(self, ask: Callable[[], bool]) -> bool:
        """What the first process answers; the others are not asked."""
        if self.alone:
            return ask()
        return bool(self._from_first(torch.tensor([float(self.is_first and ask())]))[0])

    def agreed(self, ask: Callable[[], bool]) -> Callable[[], bool]:
        """A question whose answer is the first process's, in all of them."""
        return lambda: self.first_says(ask)

    def any(self, value: bool) -> bool:
        """Whether it is so in at least one process."""
        return value if self.alone else bool(self.sum(torch.tensor([value])) > 0)

    def sum(self, values: Tensor) -> Tensor:
        """The numbers added up over all processes, on the host; alone they stay where they are."""
        if self.alone:
            return values
        total = values.to("cpu", torch.float64, copy=True)
        with self._with_the_others():
            dist.all_reduce(total)
        return total

    def least(self, value: int) -> int:
        """The smallest of all processes' numbers."""
        if self.alone:
            return value
        least = torch.tensor([value], dtype=torch.int64)
        with self._with_the_others():
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return int(least)

    def value_of_first(self, make: Callable[[], Any]) -> Any:
        """What the first process makes, in all of them; anything that JSON can carry."""
        if self.alone:
            return make()
        text = json.dumps(make()).encode() if self.is_first else b""
        size = int(self._from_first(torch.tensor([len(text)])))
        data = torch.frombuffer(bytearray(text or size), dtype=torch.uint8)
        return json.loads(bytes(self._from_first(data).tolist()))

    def require_one_start(self, step: int) -> None:
        """Raise RunError where this process would go on from another step than the first one."""
        first = self.value_of_first(lambda: step)
        if step != first:
            raise RunError(
                f"Process {self.rank} of {self.size} does not see the checkpoint of step {first}",
                f"The newest that it sees is of step {step}.",
                "Let the folder of the runs lie where all machines see it.",
            )

    def equalise(self, parameters: Iterable[Tensor]) -> None:
        """Give every process the first one's values of what each has whole."""
        for parameter in () if self.alone else self._whole(parameters):
            self._from_first(parameter.detach())

    def sum_gradients(self, parameters: Iterable[Tensor]) -> int:
        """Add up the gradients of all processes, in place; returns the bytes of gradients that each sends.

        Those of sharded weights have been by then, in the backward pass.
        """
        whole = [] if self.alone else self._whole(parameters)
        if not whole:
            return 0
        for parameter in self._with_gradients_anywhere(whole):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in whole if parameter.grad is not None]
        return sum(self._add_up(bucket) for bucket in _buckets(gradients))

    def leave(self) -> None:
        """Part from the others once all are done."""
        if not self.alone:
            self.any(False)  # a barrier
            dist.destroy_process_group()

    def _whole(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Those that each process has whole."""
        if not self.in_step:
            return list(parameters)
        from torch.distributed.tensor import DTensor  # takes seconds to import

        return [parameter for parameter in parameters if not isinstance(parameter, DTensor)]

    def _with_gradients_anywhere(self, parameters: list[Tensor]) -> list[Tensor]:
        """A process that had no micro-batch, or none with tokens for some expert, has no gradient there."""
        if not self.any(any(parameter.grad is None for parameter in parameters)):
            return parameters
        counts = self.sum(torch.tensor([parameter.grad is not None for parameter in parameters]))
        return [parameter for parameter, count in zip(parameters, counts.tolist(), strict=True) if count]

    def _add_up(self, gradients: list[Tensor]) -> int:
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        with self._with_the_others():
            dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return flat.nbytes

    def _from_first(self, tensor: Tensor) -> Tensor:
        with self._with_the_others():
            dist.broadcast(tensor, 0)
        return tensor

    @contextmanager
    def _with_the_others(self) -> Iterator[None]:
        """Inside, say of a failure which process is missing."""
        try:
            yield
        except RuntimeError as error:
            if self._store is not None:
                self._store.set(f"waited/{self.rank}", "")  # for the roll call of whoever waited longest
            if "timed out" in str(error).lower() or "timeout" in str(error).lower():
                raise self._missing() from error
            raise LostProcessError(
                "Another process of the run has ended", str(error).splitlines()[0], "Its own error says why."
            ) from error

    def _missing(self) -> RunError:
        """The error of a wait that was in vain, after a roll call."""
        missing = []
        if self._store is not None:
            time.sleep(_ROLL_CALL_SECONDS)
            missing = [rank for rank in range(self.size) if not self._store.check([f"waited/{rank}"])]
        who = " and ".join(map(str, missing)) or "a process"
        return RunError(
            f"Process {who} of {self.size} does not answer",
            f"The others waited {patience_seconds():.0f} s for it.",
            f"See what it is doing, and resume. {PATIENCE} is how many seconds the processes wait.",
        )


ALONE = World()


def is_lost_process(error: BaseException) -> bool:
    """Whether an error only says that another process has gone, which may also be raised in a backward pass."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Application timeout")
    return isinstance(error, LostProcessError | dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


def patience_seconds() -> float:
    """How long processes wait for one that does not come."""
    return float(os.environ.get(PATIENCE, PATIENCE_SECONDS))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one dtype after another, in pieces of about BUCKET_BYTES."""
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        bucket: list[Tensor] = []
        for gradient in gradients:
            if gradient.dtype is not dtype:
                continue
            if bucket and sum(part.nbytes for part in bucket) + gradient.nbytes > BUCKET_BYTES:
                yield bucket
                bucket = []
            bucket.append(gradient)
        yield bucket
