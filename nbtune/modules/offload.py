"""Checkpoints in the host's memory: what gradient checkpointing keeps leaves the GPU and comes back in time.

A checkpointed block keeps its input [1, T, D] alone. Here that input is copied to pinned memory, on a stream of its
own, while the block computes, and back while the block above is computed again (vDNN, Rhu et al. 2016,
arXiv:1602.08124). So the GPU holds two inputs, however many blocks there are. The last block's input stays, for it is
needed at once.

    with offloaded_checkpoints(model, CudaLane(device)):
        train(model)

The host's buffers are torch's: its pinned allocator hands a freed one out again when the copies that use it are over.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from nbtune._transformers import PreTrainedModel
from nbtune.modules.checkpointing import blocks_of

MIN_BYTES = 2**20  # a smaller copy takes longer to start than to run


class Transfer:
    """A copy under way: holds both ends until what is computed from then on waits for it."""

    def __init__(self, target: Tensor, source: Tensor, wait: Callable[[], None]) -> None:
        self._target = target
        self._source: Tensor | None = source
        self._wait: Callable[[], None] | None = wait

    @property
    def target(self) -> Tensor:
        """The tensor that is being written; to be read only by copies in the same lane."""
        return self._target

    def finish(self) -> Tensor:
        """Let the computation wait for the copy, let go of the source, and return the target."""
        if self._wait is not None:
            self._wait()
            self._wait = self._source = None
        return self._target

    def __del__(self) -> None:
        self.finish()  # where a step failed: memory that is being copied must not be handed out again


class Lane(Protocol):
    """Copies between a device and its host, in the order in which they begin."""

    def out(self, x: Tensor) -> Transfer:
        """Begin to copy `x`, which is being computed, to the host."""
        ...

    def back(self, host: Tensor) -> Transfer:
        """Begin to copy what `out` wrote to the device."""
        ...


class CudaLane:
    """Copies to and from pinned memory on a stream of their own, beside the stream that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def out(self, x: Tensor) -> Transfer:
        return self._begin(torch.empty(x.shape, dtype=x.dtype, pin_memory=True), x)

    def back(self, host: Tensor) -> Transfer:
        return self._begin(torch.empty(host.shape, dtype=host.dtype, device=self._device), host)

    def _begin(self, target: Tensor, source: Tensor) -> Transfer:
        """Both ends on the device belong to the computing stream, so the two streams wait for each other."""
        computing = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(computing)  # it computes the source, and may still read what the target's memory held
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            done = self._stream.record_event()
        return Transfer(target, source, lambda: computing.wait_event(done))


@contextmanager
def offloaded_checkpoints(model: PreTrainedModel, lane: Lane, min_bytes: int = MIN_BYTES) -> Iterator[None]:
    """Inside, checkpointed blocks of `model` keep their inputs in the host's memory between forward and backward.

    Args:
        model: A model whose blocks are checkpointed without reentrance, some or all. Only these objects are touched.
        lane: What copies, and where to.
        min_bytes: Smaller inputs stay where they are.
    """
    blocks = blocks_of(model)
    inputs = _Inputs(lane, min_bytes)
    for block in blocks:
        block.__dict__["forward"] = partial(inputs.forward, block, block.forward, block is blocks[-1])
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


class _Input:
    """The input of a block, for as long as autograd needs it: on the host if it is `away`."""

    def __init__(self, tensor: Tensor, away: bool, below: weakref.ref[_Input] | None) -> None:
        self.tensor = tensor
        self.away = away
        self.below = below  # the input of the block that ran before, which the backward pass needs next
        self.coming: Transfer | None = None

    def fetch(self, lane: Lane) -> None:
        if self.away and self.coming is None:
            self.coming = lane.back(self.tensor)

    def arrive(self, lane: Lane) -> Tensor:
        self.fetch(lane)
        if self.coming is None:
            return self.tensor
        coming, self.coming = self.coming, None  # not kept here: with retain_graph it comes again
        return coming.finish()


class _Inputs:
    """The inputs of one model's blocks."""

    def __init__(self, lane: Lane, min_bytes: int) -> None:
        self._lane = lane
        self._min_bytes = min_bytes
        self._leaving: list[Transfer] = []
        self._newest: weakref.ref[_Input] | None = None

    def forward(self, block: Any, run: Callable[..., Any], stays: bool, *args: Any, **kwargs: Any) -> Any:
        """`run(*args)`; of a checkpointed block the hooks see the arguments alone, not what it computes."""
        for transfer in self._leaving:  # the block below has run, so its input has had the time to leave
            transfer.finish()
        self._leaving.clear()
        if not (block.gradient_checkpointing and block.training):
            return run(*args, **kwargs)
        with saved_tensors_hooks(partial(self._pack, stays), self._unpack):
            return run(*args, **kwargs)

    def _pack(self, stays: bool, x: Tensor) -> Tensor | _Input:
        if x.nbytes < self._min_bytes:
            return x
        if not stays:
            self._leaving.append(self._lane.out(x))
        saved = _Input(x if stays else self._leaving[-1].target, not stays, self._newest)
        self._newest = weakref.ref(saved)
        return saved

    def _unpack(self, saved: Tensor | _Input) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        x = saved.arrive(self._lane)
        below = saved.below() if saved.below is not None else None
        if below is not None:
            below.fetch(self._lane)
        return x
