"""Attention: a module with projections to queries, keys, values and the output.

What it hands to the attention function beside them (the scale, a window, a cap) is taken from a call of the module
itself, so that no setting of an architecture needs to be known here.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from nbtune._transformers import AttentionInterface
from nbtune.fused.linear import described, in_compute_dtype
from nbtune.kernels.attention import packed_attention
from nbtune.kernels.lora_linear import lora_linears
from nbtune.kernels.rope import LAYOUTS, Layout, rope
from nbtune.modules.base import LINEARS
from nbtune.peft.layer import AdapterLayer

RECORDED = "nbtune_recorded"  # the value of `attn_implementation` while calls are recorded
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
_CONSTANTS = ("scaling", "sliding_window", "softcap", "s_aux")


class Call(NamedTuple):
    """What an attention module handed to the attention function, beside queries, keys and values."""

    head_dim: int
    dropout: float
    constants: dict[str, Any]


_calls: WeakKeyDictionary[nn.Module, Call] = WeakKeyDictionary()


def register() -> None:
    """Make the recording attention known to transformers. Safe to call again."""
    AttentionInterface.register(RECORDED, _record)


def recorded(module: nn.Module) -> Call | None:
    """The last call of a module whose `attn_implementation` was `RECORDED`."""
    return _calls.get(module)


def _record(module: nn.Module, query: Tensor, *args: Any, dropout: float = 0.0, **kwargs: Any) -> Any:
    constants = {name: kwargs[name] for name in _CONSTANTS if name in kwargs}
    _calls[module] = Call(query.shape[-1], dropout, constants)
    return packed_attention(module, query, *args, dropout=dropout, **kwargs)


class FusedAttention:
    """The forward pass of an attention module."""

    kind = "attention"

    def __init__(self, module: nn.Module, call: Call, layout: Layout | None) -> None:
        self.module, self.original = module, module.forward
        self.call = call
        self.layout = layout

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        modules: Any = self.module._modules
        q, k, v, o = (described(modules[name]) for name in PROJECTIONS)
        if q is None or k is None or v is None or o is None or kwargs.get("past_key_values") is not None:
            return self.original(
                hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, **kwargs
            )
        x = in_compute_dtype(hidden_states)
        query, key, value = lora_linears(x, [q, k, v])  # [B, T, heads * head_dim]
        query, key = self._heads(query, "q_norm"), self._heads(key, "k_norm")
        if self.layout is not None:
            assert position_embeddings is not None
            query, key = rope(query, key, *position_embeddings, layout=self.layout)
        constants = {**kwargs, **self.call.constants}
        y, _ = packed_attention(self.module, query, key, self._heads(value), attention_mask, **constants)
        return lora_linears(y.reshape(*x.shape[:-1], -1), [o])[0], None

    def _heads(self, projected: Tensor, norm: str | None = None) -> Tensor:
        """[B, T, heads * head_dim] as [B, heads, T, head_dim], normalised before, or within each head."""
        module: Any = self.module._modules.get(norm) if norm else None
        if module is not None and module.weight.shape[-1] == projected.shape[-1]:
            projected, module = module(projected), None
        heads = projected.view(*projected.shape[:-1], -1, self.call.head_dim)
        return (heads if module is None else module(heads)).transpose(1, 2)


def fused_attentions(module: nn.Module) -> list[FusedAttention]:
    """How the module may be computed, if it is built like attention and a call of it was recorded."""
    call = recorded(module)
    children = dict(module.named_children())
    linears = {name for name, child in children.items() if _is_linear(child)}
    others = {name for name in children if name not in linears and any(True for _ in children[name].parameters())}
    if call is None or call.dropout or linears != set(PROJECTIONS) or not others <= set(NORMS):
        return []
    return [FusedAttention(module, call, layout) for layout in (*LAYOUTS, None)]  # None: no rotary embedding


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module.base_layer if isinstance(module, AdapterLayer) else module, LINEARS)
