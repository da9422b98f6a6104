"""Gradient checkpointing of transformers' models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn


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
