"""From what a few blocks allocate to the peak of a whole step, with any number of blocks computed again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from nbtune.plan.trace import Span, Trace

TRACED = 3  # blocks that stand for all where all are alike: the first, the last, and every one between them


@dataclasses.dataclass(frozen=True)
class Peak:
    """The moment of a step at which tensors take the most memory, weights and optimiser not counted."""

    activations: int  # kept for the backward pass, and temporaries
    loss: int  # what the head and the loss hold
    gradients: int  # of parameters
    passed: int = 0  # the most that activations and loss take together at any moment of the step

    @property
    def bytes(self) -> int:
        return self.activations + self.loss + self.gradients


@dataclasses.dataclass(frozen=True)
class Step:
    """A forward and backward pass of a micro-batch."""

    kept: Trace  # with every block's activations kept
    recomputed: Trace | None  # with every block computed again; None where no number above 0 is asked for
    block_gradients: tuple[int, ...]  # bytes of each block's parameters that are trained
    other_gradients: int  # of the embedding, the last norm and the head
    embedding_gradient: int  # of it, the embedding's, the last to come
    offloaded: bool = False  # whether what a recomputed block keeps, its input, lies in another memory
    traced: bool = True

    @property
    def blocks(self) -> int:
        return len(self.block_gradients)

    def peak(self, checkpointed: int, accumulates: bool) -> Peak:
        """The peak where the first `checkpointed` blocks are computed again.

        Where a step `accumulates` several micro-batches, all but the first find the gradients of all parameters there.
        """
        moments = list(self._moments(checkpointed, accumulates))
        passed = max(moment.activations + moment.loss for moment in moments)
        return dataclasses.replace(max(moments, key=lambda moment: moment.bytes), passed=passed)

    def flops(self, checkpointed: int) -> int:
        """Of matrix products and attention."""
        spans = [self.kept.embedding, self.kept.loss, self.kept.end]
        for number in range(self.blocks):
            spans += self._block(number, checkpointed)
        return sum(span.flops for span in spans)

    def _moments(self, checkpointed: int, accumulates: bool) -> Iterator[Peak]:
        """The peak of each span."""
        everything = sum(self.block_gradients) + self.other_gradients
        gradients = everything if accumulates else 0
        live = self.kept.embedding.kept
        yield Peak(self.kept.embedding.peak, 0, gradients)
        for number in range(self.blocks):
            span = self._block(number, checkpointed)[0]
            yield Peak(live + span.peak, 0, gradients)
            live += span.kept
        loss = self.kept.loss
        yield Peak(live, loss.peak, gradients)
        live += loss.kept
        # What the head, where it is the embedding, gives to it is among the loss's until the embedding's own comes.
        gradients = max(gradients, self.other_gradients - self.embedding_gradient)
        for number in reversed(range(self.blocks)):
            span = self._block(number, checkpointed)[1]
            yield Peak(live + span.peak, 0, gradients)
            live += span.kept
            gradients = gradients if accumulates else gradients + self.block_gradients[number]
        yield Peak(live + self.kept.end.peak, 0, gradients)
        yield Peak(0, 0, everything)  # the optimiser's step

    def _block(self, number: int, checkpointed: int) -> tuple[Span, Span]:
        trace = self.kept
        if number < checkpointed:
            assert self.recomputed is not None
            trace = self.recomputed
        last = len(trace.forward) - 1
        traced = last if number == self.blocks - 1 else min(number, max(last - 1, 0))
        forward, backward = trace.forward[traced], trace.backward[traced]
        if self.offloaded and number < checkpointed:
            return dataclasses.replace(forward, kept=0), dataclasses.replace(backward, kept=0)
        return forward, backward


def extrapolated(first: Trace, second: Trace, growth: float) -> Trace:
    """The trace of a row with `growth` times the difference of these two rows' tokens more than the first."""

    def line(a: Span, b: Span) -> Span:
        return Span(*(round(x + growth * (y - x)) for x, y in zip(_values(a), _values(b), strict=True)))

    def lines(a: tuple[Span, ...], b: tuple[Span, ...]) -> tuple[Span, ...]:
        return tuple(line(x, y) for x, y in zip(a, b, strict=True))

    return Trace(
        line(first.embedding, second.embedding),
        lines(first.forward, second.forward),
        line(first.loss, second.loss),
        lines(first.backward, second.backward),
        line(first.end, second.end),
    )


def _values(span: Span) -> tuple[int, int, int]:
    return span.peak, span.kept, span.flops
