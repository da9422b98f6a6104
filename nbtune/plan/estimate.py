"""What a step allocates, by its sizes: for the few models whose forward pass cannot be traced."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbtune.kernels.linear_cross_entropy import BLOCK_BYTES, CHUNK_BYTES
from nbtune.plan.memory import Step
from nbtune.plan.trace import Span, Trace

if TYPE_CHECKING:
    from nbtune.models import ModelInfo
    from nbtune.plan.model import Weights


def estimated_step(info: ModelInfo, weights: Weights, tokens: int, itemsize: int) -> Step:
    """A step of a model whose experts, say, get as many tokens as their router sends them.

    Per token and block: the output of every projection, the activation and its product, the inputs of adapters, and
    two fp32 copies of the hidden state for the norms.
    """
    blocks = max(len(weights.block_gradients), 1)
    in_blocks = [module for module in info.modules if module.layer is not None]
    projected = sum(module.out_features for module in in_blocks) / blocks
    widest = max((module.out_features for module in in_blocks), default=info.hidden_size)
    kept = int(tokens * (itemsize * (projected + 2 * info.hidden_size + 2 * widest) + 8 * info.hidden_size))
    state = tokens * info.hidden_size * itemsize
    chunk = min(CHUNK_BYTES, 4 * tokens * info.vocabulary)
    # Forward 2 FLOPs a parameter and token, backward to the inputs 2, to the weights 2 where they are trained.
    flops = 2 * tokens * info.parameters
    backward = flops * (2 if weights.trained > info.parameters // 2 else 1)
    forward = Span(kept, kept, flops // blocks)
    again = Span(kept, state, flops // blocks)
    loss = Span(chunk * itemsize // 4 + 3 * BLOCK_BYTES + 2 * state, 0, 0)
    plain = Trace(Span(state, state), (forward,), loss, (Span(kept, -kept, backward // blocks),), Span())
    span = Span(2 * kept, -state, (backward + flops) // blocks)
    recomputed = Trace(Span(state, state), (again,), loss, (span,), Span())
    return Step(
        plain, recomputed, weights.block_gradients, weights.other_gradients, weights.embedding_gradient, traced=False
    )
