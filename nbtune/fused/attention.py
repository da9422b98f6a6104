"""Attention: a module with projections to queries, keys, values and the output.

What it hands to the attention function beside them (the scale, a window, a cap) is taken from a call of the module
itself, so that no setting of an architecture needs to be known here.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from nbtune._transformers import AttentionInterface
from nbtune.fused.linear import described
from nbtune.kernels.attention import packed_attention
from nbtune.kernels.casts import autocast
from nbtune.kernels.lora_linear import lora_linears
from nbtune.kernels.rope import LAYOUTS, Layout, rope
from nbtune.modules.base import LINEARS
from nbtune.modules.structure import projects_to
from nbtune.peft.layer import AdapterLayer

RECORDED = "nbtune_recorded"  # the value of `attn_implementation` while calls are recorded
_ROLES = ("query", "key", "value")
_CONSTANTS = ("scaling", "sliding_window", "softcap", "s_aux")


class Call(NamedTuple):
    """What an attention module handed to the attention function."""

    heads: int
    kv_heads: int
    head_dim: int
    dropout: float  # of the call in training
    constants: dict[str, Any]

    @property
    def sizes(self) -> list[int]:
        """Features of queries, keys and values."""
        return [heads * self.head_dim for heads in (self.heads, self.kv_heads, self.kv_heads)]


class Names(NamedTuple):
    """The children of an attention module by what they are for."""

    projections: tuple[str, ...]  # to queries, keys and values, or to all of them in one
    output: str
    query_norm: str | None
    key_norm: str | None


_calls: WeakKeyDictionary[nn.Module, Call] = WeakKeyDictionary()


def register() -> None:
    """Make the recording attention known to transformers. Safe to call again."""
    AttentionInterface.register(RECORDED, _record)


def recorded(module: nn.Module) -> Call | None:
    """The last call of a module whose `attn_implementation` was `RECORDED`."""
    return _calls.get(module)


def record_training(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Have the recorded module called once more as in training, where it may ask for a dropout."""
    module.training = True  # it alone: what it holds stays as it is
    try:
        module.forward(*args, **kwargs)
    finally:
        module.training = False


def _record(module: nn.Module, query: Tensor, key: Tensor, *args: Any, dropout: float = 0.0, **kwargs: Any) -> Any:
    constants = {name: kwargs[name] for name in _CONSTANTS if name in kwargs}
    _calls[module] = Call(query.shape[1], key.shape[1], query.shape[-1], dropout, constants)
    return packed_attention(module, query, key, *args, **kwargs)


class FusedAttention:
    """The forward pass of an attention module."""

    kind = "attention"

    def __init__(self, module: nn.Module, call: Call, names: Names, layout: Layout | None) -> None:
        self.module, self.original = module, module.forward
        self.call, self.names = call, names
        self.layout: Layout | None = layout

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        modules: Any = self.module._modules
        projections = [described(modules[name]) for name in self.names.projections]
        output = described(modules[self.names.output])
        if None in projections or output is None or kwargs.get("past_key_values") is not None:
            return self.original(
                hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, **kwargs
            )
        x = autocast(hidden_states)
        projected = lora_linears(x, projections)  # pyright: ignore[reportArgumentType] - [B, T, heads * head_dim]
        query, key, value = projected if len(projected) == 3 else projected[0].split(self.call.sizes, dim=-1)
        query, key = self._heads(query, self.names.query_norm), self._heads(key, self.names.key_norm)
        if self.layout is not None and position_embeddings is not None:
            query, key = rope(query, key, *position_embeddings, layout=self.layout)
        constants = {**kwargs, **self.call.constants}
        y, _ = packed_attention(self.module, query, key, self._heads(value, None), attention_mask, **constants)
        return lora_linears(y.reshape(*x.shape[:-1], -1), [output])[0], None

    def _heads(self, projected: Tensor, norm: str | None) -> Tensor:
        """[B, T, heads * head_dim] as [B, heads, T, head_dim], normalised before, or within each head."""
        module: Any = self.module._modules[norm] if norm else None
        if module is not None and module.weight.shape[-1] == projected.shape[-1]:
            projected, module = module(projected), None
        heads = projected.view(*projected.shape[:-1], -1, self.call.head_dim)
        return (heads if module is None else module(heads)).transpose(1, 2)


def fused_attentions(module: nn.Module) -> list[FusedAttention]:
    """How the module may be computed, if it is built like attention and a call of it was recorded."""
    call = recorded(module)
    names = None if call is None or call.dropout else _names(module)
    if call is None or names is None:
        return []
    layouts: list[Layout | None] = [*LAYOUTS, None]  # None: not rotary
    return [FusedAttention(module, call, names, layout) for layout in layouts]


def _names(module: nn.Module) -> Names | None:
    """None where the module has more, or other, parts than these."""
    children = {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}
    linears = [name for name in children if _is_linear(children[name])]
    norms = [name for name in children if name not in linears]
    packed = [name for name in linears if all(projects_to(name, role) for role in _ROLES)]
    by_role = [[name for name in linears if projects_to(name, role)] for role in _ROLES]
    projections = tuple(packed) if packed else tuple(name for names in by_role for name in names)
    outputs = [name for name in linears if name not in projections]
    query_norms, key_norms = ([name for name in norms if projects_to(name, role)] for role in ("query", "key"))
    if len(projections) != (1 if packed else 3) or len(outputs) != 1 or len(norms) not in (0, 2):
        return None
    if norms and (len(query_norms) != 1 or len(key_norms) != 1 or query_norms == key_norms):
        return None
    return Names(projections, outputs[0], *(query_norms or [None]), *(key_norms or [None]))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module.base_layer if isinstance(module, AdapterLayer) else module, LINEARS)
