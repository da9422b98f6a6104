"""How likely a model finds a text that is given, in pieces."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor

from nbtune._transformers import DynamicCache

PIECE = 512  # scored tokens, whose logits [PIECE, V] are in memory at once


@dataclasses.dataclass(frozen=True)
class Score:
    """What a reference costs a model."""

    loss: float  # negative log-likelihood of all of its tokens together, in nats
    tokens: int


class Logits(Protocol):
    def __call__(self, last: int, **inputs: Any) -> Tensor:
        """Logits after the last tokens [1, last, V]."""
        ...


def score(logits: Logits, ids: Tensor, given: int, cache: DynamicCache, whole: bool) -> float:
    """Negative log-likelihood, in nats, of all tokens [1, T] but the first `given`. cache: an empty one.

    whole: read them in one piece, instead of `PIECE` scored ones at a time.
    """
    count = ids.shape[1] - 1  # nothing follows the last token
    start, loss = 0, 0.0
    while start < count:
        first = max(start, given - 1)  # whose next token is scored
        end = count if whole else min(first + PIECE, count)
        found = logits(
            end - first,
            input_ids=ids[:, start:end],
            attention_mask=None,
            position_ids=torch.arange(start, end, device=ids.device)[None],
            past_key_values=cache,
        )
        loss += float(torch.nn.functional.cross_entropy(found[0].float(), ids[0, first + 1 : end + 1], reduction="sum"))
        start = end
    return loss
