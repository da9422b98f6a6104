"""Trainable tokens: some rows of an embedding are replaced; the others stay as they are.

    W' = W with W'[tokens] = D        W [vocabulary, dim], D [tokens, dim]

D holds the new rows and not a difference, so that it also means something for rows that the next resize of the
vocabulary fills at random. What is tied to the embedding, such as an output head, follows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nbtune.errors import AdapterError
from nbtune.modules.base import apply_weight, rows_of
from nbtune.peft.config import LayerConfig
from nbtune.peft.configs.vectors import TrainableTokensConfig, check_tokens
from nbtune.peft.layer import PREFIX, Adapter
from nbtune.peft.targets import Place


class TrainableTokens(Adapter):
    """The new rows [tokens, dim] of an embedding or of an output head."""

    bases: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding, nn.Linear)
    tokens: Tensor  # [tokens]

    def __init__(self, rows: nn.Parameter, tokens: list[int], inside: str = "") -> None:
        super().__init__()
        self.trainable_tokens_delta = rows
        self.register_buffer("tokens", torch.tensor(tokens, device=rows.device), persistent=False)
        self.ids = tuple(tokens)
        self.inside = inside

    @classmethod
    def create(cls, base: Any, config: TrainableTokensConfig, path: str, shared: None) -> Self:
        check_tokens("token_indices", config.token_indices)
        rows = rows_of(base, config.token_indices, path, "token_indices")
        return cls(nn.Parameter(rows if config.init_weights else torch.randn_like(rows)), config.token_indices)

    def file_prefix(self, path: str) -> str:
        return f"{PREFIX}{path}.{self.inside}"

    def forward(self, x: Tensor, y: Tensor, base: Any) -> Tensor:
        rows = self.trainable_tokens_delta
        if isinstance(base, nn.Linear):  # logits: those of the tokens are computed anew
            logits = F.linear(x, rows.to(x.dtype)) + (0 if base.bias is None else base.bias[self.tokens])
            return y.scatter(-1, self.tokens.expand(logits.shape), logits.to(y.dtype))
        is_token = x.unsqueeze(-1) == self.tokens  # [batch, length, tokens]
        padding = self.ids.index(base.padding_idx) if base.padding_idx in self.ids else None  # torch: never trained
        new = F.embedding(is_token.int().argmax(-1), rows, padding)
        if type(base) is not nn.Embedding:  # Gemma's embeddings scale their output
            new = new * apply_weight(base, x, rows.new_ones(base.num_embeddings, 1))
        return torch.where(is_token.any(-1, keepdim=True), new.to(y.dtype), y)

    def merged_weight(self, weight: Tensor, base: nn.Module) -> Tensor:
        return weight.index_copy(0, self.tokens, self.trainable_tokens_delta.detach().to(weight.dtype))


class _Tied(TrainableTokens):
    """The same rows again where a weight is tied to an embedding; the embedding's adapter stores them."""

    repeated: ClassVar[tuple[str, ...]] = ("trainable_tokens_delta",)

    def own_state(self) -> dict[str, Tensor]:
        return {}


def token_adapters(
    model: Any, config: LayerConfig, adapters: Mapping[str, Adapter], places: Mapping[str, Place]
) -> dict[str, TrainableTokens]:
    """What a config's trained tokens add to its `adapters`, by path: new rows, and those that follow tied ones."""
    named = {path: adapter for path, adapter in adapters.items() if isinstance(adapter, TrainableTokens)}
    wanted = config.trained_tokens
    if wanted is not None:
        if not isinstance(wanted, dict):
            embedding = model.get_input_embeddings()
            base = {id(module) for module in (embedding, embedding._modules.get("base_layer"))}
            wanted = {path: wanted for path, place in places.items() if id(place.module) in base}
        for name, tokens in wanted.items():
            paths = [path for path in places if path == name or path.endswith(f".{name}")]
            if not paths:
                message = f"trainable_token_indices: no module of the model matches {name!r}."
                raise AdapterError("No such module", message, "Name an embedding, or give a list of tokens.")
            for path in paths:
                check_tokens("trainable_token_indices", tokens)
                rows = rows_of(places[path].module, tokens, path, "trainable_token_indices")
                named[path] = TrainableTokens(nn.Parameter(rows), tokens, "token_adapter.")
    for source, adapter in list(named.items()):
        weight = places[source].module._parameters.get("weight")
        if not isinstance(places[source].module, nn.Embedding) or type(named[source]) is _Tied:
            continue
        for path, place in places.items():
            apart = path == source or (path in named and named[path].ids != adapter.ids)
            if place.module._parameters.get("weight") is weight and not apart:
                named[path] = _Tied(adapter.trainable_tokens_delta, list(adapter.ids), adapter.inside)
    return {path: adapter for path, adapter in named.items() if adapters.get(path) is not adapter}
