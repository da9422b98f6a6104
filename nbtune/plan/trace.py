"""What a training step allocates, seen by running it on tensors that have shapes but no memory.

The forward and backward pass of the run's own model, adapter, attention and loss run on torch's fake tensors, which
take the kernels of the real device. A dispatch mode follows each storage from the operation that makes it to the moment
it is freed, so that temporaries and what is kept for the backward pass are counted, whatever the architecture and the
method are. Matrix products are counted on the way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from nbtune.kernels.attention import segment_arguments
from nbtune.kernels.linear_cross_entropy import cross_entropy_of_head
from nbtune.models.training import precision
from nbtune.modules.checkpointing import blocks_of
from nbtune.peft.prompt import packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

aten, prim = torch.ops.aten, torch.ops.prim


@dataclass(frozen=True)
class Span:
    """A stretch of a step."""

    peak: int = 0  # bytes, the most at any moment above what was there when it began
    kept: int = 0  # bytes at its end above those at its beginning; negative where it frees more than it makes
    flops: int = 0  # of matrix products and attention


@dataclass(frozen=True)
class Trace:
    """A forward and a backward pass, block by block. The gradients of parameters are not in it: they were there."""

    embedding: Span
    forward: tuple[Span, ...]
    loss: Span  # the last norm, the head and the loss, with their backward pass
    backward: tuple[Span, ...]  # in the order of the blocks; the last is the first to run
    end: Span  # what is left of the backward pass after the first block


def trace_step(
    model: PreTrainedModel,
    tokens: int,
    segment: int,
    labelled: int,
    *,
    compute_dtype: torch.dtype,
    device: torch.device,
) -> Trace:
    """Follow a step of `model` on one flat row.

    Args:
        model: On the meta device, with its adapter, in train mode. Its weights become fake tensors.
        tokens: Of the row.
        segment: Tokens of each example in it; the last may be shorter.
        labelled: Rows of the loss, which need not be of this row.
        compute_dtype: Of the forward pass, where the weights are fp32.
        device: Whose kernels are meant.

    Raises torch's DynamicOutputShapeException or DataDependentOutputException where the forward pass depends on its
    data.
    """
    borders = torch.tensor([*range(0, tokens, segment), tokens], dtype=torch.int32)  # read on the host: not fake
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    follower = _Follower(labelled)
    with torch.random.fork_rng(devices=[]), fake, torch.device(device):
        _become_fake(model, follower)
        row = {
            "input_ids": torch.zeros(1, tokens, dtype=torch.long),
            "position_ids": torch.zeros(1, tokens, dtype=torch.long),
            "use_cache": False,
            **segment_arguments(borders, min(segment, tokens)),
        }
        labels = torch.zeros(tokens - 1, dtype=torch.long)
        with follower, _marked(blocks_of(model), follower):
            follower.enter("embedding")
            with precision(model, device.type, compute_dtype):
                loss = _loss(model, row, labels)
            loss.backward()
            del loss
            follower.enter("done")
    numbers = range(len(blocks_of(model)))
    span = follower.span
    forward = tuple(span(f"forward {number}") for number in numbers)
    backward = tuple(span(f"backward {number}") for number in numbers)
    return Trace(span("embedding"), forward, span("loss"), backward, span("end"))


def _become_fake(model: nn.Module, follower: _Follower) -> None:
    """Give the modules parameters, with gradients, and buffers that are fake; shared ones stay shared."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in made:
                fake = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
                made[parameter] = fake
                follower.ignore(fake)
                if fake.requires_grad:
                    fake.grad = torch.empty_like(fake)
                    follower.ignore(fake.grad)
            if parameter is not None:
                module._parameters[name] = made[parameter]  # pyright: ignore[reportArgumentType] - a parameter
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer not in made:
                made[buffer] = torch.empty(buffer.shape, dtype=buffer.dtype)
                follower.ignore(made[buffer])
            if buffer is not None:
                module._buffers[name] = made[buffer]


def _loss(model: PreTrainedModel, row: dict[str, Any], labels: Tensor) -> Tensor:
    """The loss, as nbtune.train.loss computes it."""
    arguments, places = packed(model, row)
    hidden = model.get_decoder()(**arguments).last_hidden_state[:, places][0, :-1]
    head: Any = model.get_output_embeddings()
    vocabulary = model.config.get_text_config().vocab_size
    return cross_entropy_of_head(head, hidden, labels, vocabulary=vocabulary).loss


@contextmanager
def _marked(blocks: list[nn.Module], follower: _Follower) -> Iterator[None]:
    """Tell the follower where the forward and the backward pass of each block begin."""
    hooks = []
    for number, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(_before(number, follower), with_kwargs=True))
        hooks.append(block.register_forward_hook(_after(number, number + 1 == len(blocks), follower)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _before(number: int, follower: _Follower) -> Callable[..., None]:
    def hook(_block: nn.Module, args: Any, kwargs: Any) -> None:
        follower.enter(f"forward {number}")
        if number == 0:
            _when_backward(args or kwargs, "end", follower)

    return hook


def _after(number: int, last: bool, follower: _Follower) -> Callable[..., None]:
    def hook(_block: nn.Module, _args: Any, output: Any) -> None:
        if last:
            follower.enter("loss")
        _when_backward(output, f"backward {number}", follower)

    return hook


def _when_backward(states: Any, name: str, follower: _Follower) -> None:
    """Begin the span when the gradient of the hidden states, the first tensor, is there."""
    hidden = next((leaf for leaf in tree_leaves(states) if isinstance(leaf, Tensor)), None)
    if hidden is not None and hidden.requires_grad:
        hidden.register_hook(lambda _gradient: follower.enter(name))


class _Follower(TorchDispatchMode):
    """Follows the storages that operations make, and counts the operations' FLOPs, by spans."""

    def __init__(self, labelled: int) -> None:
        super().__init__()
        self._labelled = labelled
        self._live: dict[int, weakref.ref[torch.UntypedStorage]] = {}  # by the address of torch's own object
        self._bytes = self._most = self._flops = self._began = 0
        self._name = ""
        self._spans: dict[str, Span] = {}

    def enter(self, name: str) -> None:
        """End the present span and begin one of this name."""
        self._spans[self._name] = Span(self._most - self._began, self._bytes - self._began, self._flops)
        self._began = self._most = self._bytes
        self._flops = 0
        self._name = name

    def span(self, name: str) -> Span:
        """One that has ended; nothing where there was none, such as the backward pass of a frozen block."""
        return self._spans.get(name, Span())

    def ignore(self, tensor: Tensor) -> None:
        """It was there before."""
        storage = tensor.untyped_storage()
        self._live[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # half of all calls, and the mode below takes its time for it
        if func is aten.nonzero.default and args[0].ndim == 1:
            output = args[0].new_empty(self._labelled, 1, dtype=torch.long)
        elif func is aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True  # whether the gradient of the loss is 1
        elif _has_values(func, args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        else:
            output = func(*args, **kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self._flops += count(*args, **kwargs, out_val=output)
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        return output

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return
        self._live[key] = weakref.ref(storage, lambda _: self._freed(key, size))
        self._bytes += size
        self._most = max(self._most, self._bytes)

    def _freed(self, key: int, size: int) -> None:
        del self._live[key]
        self._bytes -= size


def _has_values(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation is on numbers that are there: borders of segments, and the seed of a dropout."""
    if func in (aten.randint.low, aten.randint.low_generator):
        return args[2] == []
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return bool(tensors) and not any(isinstance(tensor, FakeTensor) for tensor in tensors)
