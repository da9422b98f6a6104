"""Find the blocks of a model that the kernels can compute, prove each on a few tokens, and use them for a while."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nbtune._transformers import PreTrainedModel
from nbtune.fused import attention
from nbtune.fused.attention import fused_attentions
from nbtune.fused.linear import fused_linear
from nbtune.fused.mlp import fused_mlps
from nbtune.fused.norm import fused_norms
from nbtune.kernels import attention as packed
from nbtune.modules import quantised
from nbtune.modules.base import evaluating

TOKENS = 8  # of the proof
_FINDERS: tuple[Callable[[nn.Module], list[Any]], ...] = (fused_linear, fused_norms, fused_mlps, fused_attentions)


class Seen(NamedTuple):
    """One call of a module: its arguments and its output."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor


class Fused(NamedTuple):
    """What is computed by kernels, and what looked as if it could be but gives other numbers."""

    counts: Mapping[str, int]  # modules by kind
    refused: Mapping[str, float]  # the path of a module, and its relative error


@contextmanager
def fused(model: PreTrainedModel) -> Iterator[Fused]:
    """Compute the blocks of `model` by kernels inside; the model must be set to nbtune's packed attention.

    On the meta device blocks are taken for what they look like, since there are no numbers to compare.
    """
    bound: list[nn.Module] = []
    counts: Counter[str] = Counter()
    refused: dict[str, float] = {}
    try:
        with torch.no_grad(), evaluating(model):
            for path, module, candidates, seen in _candidates(model):
                block, error = _best(candidates, seen)
                if error > _tolerance(module, seen.output):
                    refused[path] = error
                    continue
                module.__dict__["forward"] = block
                bound.append(module)
                counts[block.kind] += 1
        yield Fused(dict(counts), refused)
    finally:
        for module in bound:
            del module.__dict__["forward"]


def _candidates(model: PreTrainedModel) -> list[tuple[str, nn.Module, list[Any], Seen]]:
    calls = _observe(model)
    found = []
    for path, module in model.named_modules():
        if module in calls and (candidates := [block for finder in _FINDERS for block in finder(module)]):
            found.append((path, module, candidates, calls[module]))
    return found


def _observe(model: PreTrainedModel) -> dict[nn.Module, Seen]:
    """One call of each module of the decoder, in a forward pass of a few tokens."""
    calls: dict[nn.Module, Seen] = {}

    def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            calls[module] = Seen(args, kwargs, first)
        if attention.recorded(module) is not None:
            attention.record_training(module, args, kwargs)

    hooks = [module.register_forward_hook(see, with_kwargs=True) for module in model.modules()]
    attention.register()
    positions = torch.arange(TOKENS, device=model.device)[None]
    borders = torch.tensor([0, TOKENS], dtype=torch.int32)
    try:
        model.set_attn_implementation(attention.RECORDED)
        model.get_decoder()(
            input_ids=positions + 1,
            position_ids=positions,
            use_cache=False,
            **packed.segment_arguments(borders, TOKENS),
        )
    finally:
        model.set_attn_implementation(packed.NAME)
        for hook in hooks:
            hook.remove()
    return calls


def _best(candidates: list[Any], seen: Seen) -> tuple[Any, float]:
    """The candidate whose output is nearest to what was seen, and its relative error."""
    if seen.output.is_meta or candidates[0].kind == "linear":  # nothing is guessed of a linear layer
        return candidates[0], 0.0
    errors = []
    for block in candidates:
        output = block(*seen.args, **seen.kwargs)
        output = output[0] if isinstance(output, tuple) else output
        errors.append(_relative(output, seen.output))
    best = min(range(len(errors)), key=errors.__getitem__)
    return candidates[best], errors[best]


def _relative(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    theirs = theirs.double()
    return float((ours.double() - theirs).norm() / theirs.norm().clamp(min=1e-12))


def _tolerance(module: nn.Module, output: Tensor) -> float:
    """What rounding explains; 8-bit layers also round their inputs, where ours do not."""
    if any(quantised.is_quantised(child) for child in module.modules()):
        return 0.05
    return {torch.float64: 1e-6, torch.float32: 1e-4}.get(output.dtype, 0.02)
