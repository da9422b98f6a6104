"""Gradient checkpointing of transformers' models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from nbtune._transformers import PreTrainedModel


def blocks_of(model: PreTrainedModel) -> list[Any]:
    """The decoder's blocks that can be computed again in the backward pass, in the order of the forward pass."""
    return [module for module in model.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_blocks(model: PreTrainedModel, count: int) -> None:
    """Compute the first `count` blocks again in the backward pass, and keep the activations of the others.

    The first ones, because the backward pass comes to them last: when it does, the others' activations are freed, and
    a block computed again needs no more room than one that was kept.
    """
    if count == 0:
        model.activation_checkpointing_disable()
        return
    model.activation_checkpointing_enable({"use_reentrant": False})
    for block in blocks_of(model)[count:]:
        block.gradient_checkpointing = False


@contextmanager
def recomputed_within(model: nn.Module, context: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Blocks that run in here and are checkpointed run within `context` whenever they run again, also much later."""
    blocks: list[Any] = [module for module in model.modules() if vars(module).get("gradient_checkpointing", False)]
    originals = [block._gradient_checkpointing_func for block in blocks]

    def within(checkpoint_function: Callable[..., Any]) -> Callable[..., Any]:
        def checkpointed(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                with context():
                    return block(*args, **kwargs)

            return checkpoint_function(run, *args, **kwargs)

        return checkpointed

    for block, original in zip(blocks, originals, strict=True):
        block._gradient_checkpointing_func = within(original)
    try:
        yield
    finally:
        for block, original in zip(blocks, originals, strict=True):
            block._gradient_checkpointing_func = original
