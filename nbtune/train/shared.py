"""One base model on which several runs train: their micro-batches go through it together.

Each run lives in a thread of its own, in the very loop of a run alone (train/loop.py), on a `Member`: a model that has
no adapter but the run's, and whose forward pass waits for those of the others. One thread, that of `conduct`, does all
work on the model, and only one of all these threads is at work at any time, so nothing here depends on their timing:

    every run has asked -> one pass of the base for all of them -> the runs take their steps, one after the other -> ...

A pass adds its gradients to those of the adapters only once it is complete, so one that fails is done again in parts;
what fails even alone is the error of that run, and the others go on without it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from nbtune.fused.linear import is_low_rank
from nbtune.fused.stretches import Draws, Stretch, Stretches, alone
from nbtune.kernels.casts import casts_kept
from nbtune.kernels.linear_cross_entropy import LossOutput
from nbtune.modules.checkpointing import blocks_of
from nbtune.peft.config import PromptLearningConfig
from nbtune.peft.layer import AdapterLayer
from nbtune.plan.together import PASS_TOKENS
from nbtune.train.loss import CausalLMLoss
from nbtune.train.member import OwnAdapter
from nbtune.train.memory import release, trim_heap
from nbtune.train.room import is_out_of_memory

T = TypeVar("T")


class Request:
    """What a run asks of the model, and what came of it: some work on it, or else a micro-batch to train on."""

    def __init__(self, member: Member, work: Callable[[], Any] | None = None) -> None:
        self.member = member
        self.work = work
        self.answer: Any = None
        self.error: BaseException | None = None
        self.answered = threading.Event()


class MicroBatch(Request):
    """A micro-batch of a run: the arguments of `CausalLMLoss.forward`, and where the run's random numbers stand."""

    def __init__(self, member: Member, arguments: dict[str, Any], num_items: int | Tensor | None) -> None:
        super().__init__(member)
        self.arguments, self.num_items = arguments, num_items
        self.draws = Draws(arguments["input_ids"].device)

    @property
    def tokens(self) -> int:
        return self.arguments["input_ids"].shape[1]


class SharedBase:
    """A model with several adapters, each of a run of its own.

    Args:
        loss_model: The model and its loss, on the device to train on; `fused` inside `stretched`.
        width: The most runs of one pass.
        on_warning: Told when passes become narrower.
    """

    def __init__(self, loss_model: CausalLMLoss, width: int, on_warning: Callable[[str], None]) -> None:
        self.loss_model = loss_model
        self.width = width
        self._on_warning = on_warning
        self._device = next(loss_model.parameters()).device
        self._state = next(m.state for m in loss_model.modules() if isinstance(m, AdapterLayer))
        self.outside = Draws(self._device)  # where torch's own generators stand outside the runs' steps
        self._changed = threading.Condition()
        self._working: set[Member] = set()
        self._asked: dict[Member, Request] = {}
        self._away: set[Member] = set()
        self._broken: BaseException | None = None

    def join(self, adapted: OwnAdapter, label_smoothing: float) -> Member:
        """A place for a run. From now on passes wait for it until it asks, is away, or leaves."""
        member = Member(self, adapted, label_smoothing)
        self._working.add(member)
        return member

    def ask(self, request: Request) -> Any:
        """Called by a run's thread: wait for the answer. Raises what went wrong, for this run."""
        with self._changed:
            self._working.discard(request.member)
            self._away.discard(request.member)
            if self._broken is None:
                self._asked[request.member] = request
                self._changed.notify_all()
            else:
                request.error = self._broken
                request.answered.set()
        request.answered.wait()
        error, request.error = request.error, None  # whose frames hold tensors: nothing here is to hold it
        try:
            if error is not None:
                raise error
        finally:
            del error
        return request.answer

    def leave(self, member: Member, *, for_good: bool = True) -> None:
        """Called by a run's thread: the others go on without it."""
        with self._changed:
            self._working.discard(member)
            self._away.discard(member)
            if not for_good:
                self._away.add(member)
            self._changed.notify_all()

    def conduct(self) -> None:
        """Answer the runs until the last has left."""
        try:
            while asked := self._all_asked():
                works = [request for request in asked if not isinstance(request, MicroBatch)]
                if works:  # what a run does by itself comes first, so that it is there again for the next pass
                    self._do(works[0])
                    self._resume(works[:1])
                else:
                    batches = cast("list[MicroBatch]", asked)
                    for number, group in enumerate(self._grouped(batches)):
                        if number and self._device.type == "cpu":
                            trim_heap()  # as each run does after its own
                        self._pass(group)
                    self._resume(asked)
        except BaseException as error:
            with self._changed:
                self._broken = error
                self._resume_with(error)
            raise

    def _all_asked(self) -> list[Request]:
        """What is asked once no run is at work, in the order of the runs; nothing when all have left."""
        with self._changed:
            self._changed.wait_for(lambda: not self._working and (self._asked or not self._away))
            return sorted(self._asked.values(), key=lambda request: request.member.name)

    def _resume(self, requests: Sequence[Request]) -> None:
        """Give the answers, to one run after the other: each works until it asks again."""
        for request in requests:
            with self._changed:
                del self._asked[request.member]
                self._working.add(request.member)
                request.answered.set()
                self._changed.wait_for(lambda: not self._working)

    def _resume_with(self, error: BaseException) -> None:
        for request in self._asked.values():
            request.error = error
            request.answered.set()
        self._asked.clear()

    def _do(self, request: Request) -> None:
        """What a run does by itself: evaluation, samples."""
        work = request.work
        assert work is not None
        try:
            self._set_mode(request.member.training)
            with alone(self._state, request.member.name):
                request.answer = work()
        except Exception as error:  # noqa: BLE001 - the run's own: its thread raises it
            request.error = error

    def _set_mode(self, training: bool) -> None:
        if self.loss_model.training != training:  # else a thousand modules would be told for nothing
            self.loss_model.train(training)

    def _grouped(self, batches: Sequence[MicroBatch]) -> Iterator[list[MicroBatch]]:
        """The micro-batches of each pass: as many as keep the device busy, of runs that can share one."""
        recomputes = any(block.gradient_checkpointing for block in blocks_of(self.loss_model.model))
        width = 1 if recomputes else self.width  # what is computed again would find other adapters active
        enough = PASS_TOKENS[self._device.type]
        for kind in ("low-rank", "other"):
            group: list[MicroBatch] = []
            for batch in (batch for batch in batches if batch.member.kind == kind):
                tokens = sum(other.tokens for other in group)
                if group and (len(group) >= width or tokens + batch.tokens > enough):
                    yield group
                    group = []
                group.append(batch)
            if group:
                yield group
        yield from ([batch] for batch in batches if batch.member.kind == "alone")

    def _pass(self, group: list[MicroBatch]) -> None:
        """Compute losses and gradients of these micro-batches; where that fails, of fewer at a time."""
        failed: Exception | None = None
        try:
            outputs = self._gradients(group)
        except Exception as error:  # noqa: BLE001 - one run's fault must not be the others'
            failed = error
        else:
            for batch, output in zip(group, outputs, strict=True):
                batch.answer = output
            return
        if len(group) == 1:
            group[0].error = failed
            return
        lacked_memory = is_out_of_memory(failed)
        reason = (str(failed).splitlines() or [type(failed).__name__])[0]
        del failed  # with the tensors of its frames
        release(self._device)
        if lacked_memory:
            self._narrow(len(group) // 2, f"memory ran out with {len(group)}")
            for smaller in self._grouped(group):
                self._pass(smaller)
            return
        for batch in group:
            self._pass([batch])
        if not any(batch.error for batch in group):  # it is no run's fault
            self._narrow(1, reason)

    def _narrow(self, width: int, reason: str) -> None:
        self.width = width
        how = f"at most {width} runs" if width > 1 else "one run"
        self._on_warning(f"A pass holds {how} from now on: {reason}.")

    def _gradients(self, group: list[MicroBatch]) -> list[LossOutput]:
        """Add each run's gradients to those that its adapter has; its loss, and what else the softmax tells."""
        model = self.loss_model
        self._set_mode(training=True)
        row = joined([batch.arguments for batch in group])
        lengths = [batch.tokens for batch in group]
        draws = [batch.draws.copy() for batch in group]  # a pass that is done again draws the same
        parameters = [p for batch in group for p in batch.member.adapted.parameters() if p.requires_grad]
        with casts_kept(), ExitStack() as around:
            if len(group) == 1:
                around.enter_context(alone(self._state, group[0].member.name))
                around.enter_context(draws[0].within())
                hidden = model.hidden(**row)
            else:
                ends = torch.tensor(lengths).cumsum(0).tolist()
                stretches = Stretches([
                    Stretch(batch.member.name, (end - batch.tokens, end), own)
                    for batch, end, own in zip(group, ends, draws, strict=True)
                ])  # fmt: skip
                untouched = Draws(self._device)
                with stretches.within(self._state):
                    hidden = model.hidden(**row)
                if not untouched.are_next():
                    raise RuntimeError("the base model draws random numbers, which runs cannot share")
            outputs = []
            for batch, part in zip(group, hidden.split(lengths, dim=1), strict=True):
                with alone(self._state, batch.member.name):
                    smoothing = batch.member.label_smoothing
                    outputs.append(model.of_hidden(part, batch.arguments["labels"], batch.num_items, smoothing))
            gradients = torch.autograd.grad([output.loss for output in outputs], parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                _add_gradient(parameter, gradient)
        return [LossOutput(*(figure.detach() for figure in output)) for output in outputs]  # without what made them


class Member(nn.Module):
    """A run's view of a shared base, in the place of its `CausalLMLoss`: of all adapters it has the run's only.

    Its forward pass in training mode gives the loss with the gradients of the adapter already added to those it has.
    """

    adapted: OwnAdapter

    def __init__(self, shared: SharedBase, adapted: OwnAdapter, label_smoothing: float) -> None:
        super().__init__()
        self._shared = shared
        self.__dict__["adapted"] = adapted  # no submodule: it names its parameters itself
        self.label_smoothing = label_smoothing
        self.kind = _kind(adapted)

    @property
    def name(self) -> str:
        return self.adapted.name

    def forward(self, *, num_items: int | Tensor | None = None, **arguments: Any) -> LossOutput:
        """What `CausalLMLoss.forward` gives for the same arguments, all named."""
        model = self._shared.loss_model
        if not self.training:
            return self.by_itself(lambda: model(**arguments, num_items=num_items))
        batch = MicroBatch(self, arguments, num_items)
        self._shared.outside.put_back()  # the next run's thread keeps what it finds, to put it back
        loss, correct, entropy = self._shared.ask(batch)
        return LossOutput(loss.requires_grad_(), correct, entropy)

    def verify(self, **arguments: Any) -> None:
        """As `CausalLMLoss.verify`."""
        self.by_itself(lambda: self._shared.loss_model.verify(**arguments))

    def by_itself(self, work: Callable[[], T]) -> T:
        """Do something with the model that has the run's adapter active, without gradients, while the others wait."""
        return self._shared.ask(Request(self, torch.no_grad()(work)))

    def within(self, work: Callable[[], T]) -> T:
        """As `CausalLMLoss.within`: no weights are sharded here, and `work` asks for the model itself."""
        return work()

    def begin(self) -> None:
        """Wait for the run's first turn."""
        self.by_itself(lambda: None)

    def leave(self) -> None:
        """The run has ended."""
        self._shared.leave(self)

    def away_while(self, should_pause: Callable[[], bool]) -> Callable[[], bool]:
        """The same question; while its answer is yes, the others do not wait for this run."""
        away = False

        def ask() -> bool:
            nonlocal away
            pauses = should_pause()
            if pauses and not away:
                self._shared.leave(self, for_good=False)
            elif away and not pauses:
                self.begin()
            away = pauses
            return pauses

        return ask

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapter's, by the names that they have in a model of the run alone."""
        return self.adapted.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        return self.adapted.named_buffers(*args, **kwargs)


def _kind(adapted: OwnAdapter) -> str:
    """Which runs share passes: those whose layers the kernels compute; others; and those that are by themselves.

    A prompt changes the row itself. Where only some layers are the kernels', which ones depends on the other runs, and
    so would what a dropout draws.
    """
    if isinstance(adapted.config, PromptLearningConfig):
        return "alone"
    low_rank = [is_low_rank(adapter) for adapter in adapted.adapters.values()]
    if all(low_rank):
        return "low-rank"
    drops = adapted.config.to_dict().get("lora_dropout", 0.0) > 0
    return "alone" if drops and any(low_rank) else "other"


def _add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """As a backward pass does: fused optimisers rely on a gradient that lies in memory as its parameter does."""
    if parameter.grad is not None:
        parameter.grad.add_(gradient)
    elif gradient.stride() == parameter.stride():
        parameter.grad = gradient
    else:
        parameter.grad = torch.empty_like(parameter).copy_(gradient)


def joined(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The arguments of `CausalLMLoss.hidden` for flat rows laid end to end."""
    borders = [torch.zeros(1, dtype=torch.int32)]
    for row in rows:
        borders.append(borders[-1][-1] + row["cu_seq_lens"][1:])
    return {
        "input_ids": torch.cat([row["input_ids"] for row in rows], dim=1),
        "position_ids": torch.cat([row["position_ids"] for row in rows], dim=1),
        "cu_seq_lens": torch.cat(borders),
        "max_length": max(row["max_length"] for row in rows),
    }
