"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190): attention over [P_K; K] and [P_V; V] in every layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from nbtune._transformers import PreTrainedModel
from nbtune.errors import AdapterError
from nbtune.modules import virtual_tokens
from nbtune.modules.base import compute_dtype, empty
from nbtune.modules.virtual_tokens import Arguments, takes_cache, text_config
from nbtune.peft.configs.prompts import PrefixTuningConfig
from nbtune.peft.prompt import Prompt, Prompted

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_OTHER_KEYS = ("kv_lora_rank", "num_kv_shared_layers")  # settings of models whose layers do not each have their own


class PrefixTuning(Prompt):
    """P [num_virtual_tokens, num_layers * 2 * token_dim]: keys and values [heads, head_dim] of each layer, in turn.

    token_dim is the width of all keys together, heads * head_dim. With `prefix_projection`, P = W2 tanh(W1 E), as in
    the paper; the file holds P, and a loaded prefix goes on as P itself.
    """

    def __init__(self, embedding: Tensor, config: PrefixTuningConfig, encoder: nn.Module | None = None) -> None:
        super().__init__(embedding, config, encoder)
        self.heads, self.layers = config.num_attention_heads or 1, config.num_layers or 1
        self.submodules = config.num_transformer_submodules or 1

    @classmethod
    def create(cls, base: Any, config: PrefixTuningConfig, path: str, shared: None) -> Self:
        width = config.token_dim or base.embedding_dim
        out, zero = (config.num_layers or 1) * 2 * width, config.init_weights == "zero"
        if not config.prefix_projection or config.inference_mode:
            prefix = empty(base, config.num_virtual_tokens, out)
            return cls(prefix.zero_() if zero else nn.init.normal_(prefix), config)
        hidden = config.encoder_hidden_size or width
        where = {"device": base.weight.device, "dtype": compute_dtype(base)}
        last = nn.Linear(hidden, out, **where)
        if zero:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        projection = nn.Sequential(nn.Linear(width, hidden, **where), nn.Tanh(), last)
        return cls(nn.init.normal_(empty(base, config.num_virtual_tokens, width)), config, projection)

    @classmethod
    def facts(cls, model: PreTrainedModel) -> dict[str, int]:
        """The sizes of the keys; with grouped queries there are fewer heads of them."""
        config = text_config(model)
        values = config.to_dict()
        foreign = set(values.get("layer_types") or ()) - _ATTENTION
        if foreign or any(map(values.get, _OTHER_KEYS)) or not any(map(takes_cache, (model, model.base_model))):
            message = f"{type(model).__name__} does not attend to plain keys and values in every layer."
            raise AdapterError("No place for a prefix", message, "Use PROMPT_TUNING, or a method that adapts layers.")
        heads = values.get("num_key_value_heads") or config.num_attention_heads
        head_dim = values.get("head_dim") or values.get("d_kv") or config.hidden_size // config.num_attention_heads
        return {"token_dim": heads * head_dim, "num_layers": config.num_hidden_layers, "num_attention_heads": heads}

    @classmethod
    def hooked(cls, model: PreTrainedModel) -> dict[nn.Module, Callable[[Prompted, Arguments], Arguments]]:
        if model.training and torch.is_grad_enabled() and model.is_activation_checkpointing:
            message = "Gradient checkpointing runs each layer without the keys and values of the prefix."
            raise AdapterError("Not with gradient checkpointing", message, "Switch it off, or use PROMPT_TUNING.")
        return {model if takes_cache(model) else model.base_model: cls.before_keys}

    @staticmethod
    def before_keys(prompted: Prompted, arguments: Arguments) -> Arguments:
        prefix: Any = prompted.prompts[0]

        def pairs(rows: int) -> list[tuple[Tensor, Tensor]]:
            return prefix.keys_and_values(prompted.tokens(rows).to(prompted.model.dtype))

        return virtual_tokens.before_keys(prompted.model, prompted.length, pairs, arguments)

    @classmethod
    def packed(cls, prompted: Prompted, arguments: Arguments) -> tuple[Arguments, Tensor | slice]:
        prefix: Any = prompted.prompts[0]
        pairs = prefix.keys_and_values(prompted.tokens(1))
        positions = arguments["position_ids"] + prompted.length
        return {**arguments, "position_ids": positions, "prefix": pairs}, slice(None)

    def keys_and_values(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For P [B, n, layers * 2 * token_dim], of each layer [B, heads, n, head_dim] twice."""
        parts = tokens.unflatten(-1, (2 * self.layers, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # With two submodules PEFT spreads P over self and cross attention, and then drops the latter.
        pairs = [layer * self.submodules % self.layers for layer in range(self.layers)]
        return [(parts[2 * pair], parts[2 * pair + 1]) for pair in pairs]
