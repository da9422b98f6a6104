"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al. 2021, arXiv:2106.09685.

    y = W x + s B A x        W [out, in], A [r, in], B [out, r]; s = alpha / r, or alpha / sqrt(r) with rsLoRA

rsLoRA is Kalajdzievski 2023, arXiv:2312.03732. DoRA (Liu et al. 2024, arXiv:2402.09353) also trains the length m [out]
of the weight's rows:

    y = m / |W + s B A| (W + s B A) x

An init that takes A and B out of W itself (PiSSA, OLoRA) subtracts its start: y = W x + s (B A - B0 A0) x.
PEFT puts the difference into the base weight; here the base stays what it is, for disabling and for other adapters.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nbtune.errors import AdapterError
from nbtune.kernels import low_rank_inits as inits
from nbtune.kernels.low_rank import LowRank, combine
from nbtune.kernels.low_rank_update import a_token_each, add_low_rank, add_low_rank_by_row, add_to_tokens, row_norms
from nbtune.modules import quantised
from nbtune.modules.base import CONVOLUTIONS, LINEARS, apply_weight, refuse_groups, weight_of, zeros
from nbtune.modules.loftq import loftq
from nbtune.modules.paths import of_pattern
from nbtune.modules.row_groups import Group
from nbtune.peft.configs.lora import LoraConfig
from nbtune.peft.layer import Adapter


class Lora(Adapter):
    """One low-rank update of a linear layer. Parameters are fp32, cast to the input's precision to compute."""

    bases: ClassVar[tuple[type[nn.Module], ...]] = (*LINEARS, *CONVOLUTIONS, nn.Embedding)
    weighted: ClassVar[bool] = True
    file_names: ClassVar[dict[str, str]] = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_bias": "lora_B.bias",
        "magnitude": "lora_magnitude_vector",
    }
    lora_bias: nn.Parameter | None  # [out]
    magnitude: nn.Parameter | None  # DoRA's m, [out], of a convolution [1, out, 1, ...]
    start_A: Tensor | None
    start_B: Tensor
    base_change: Tensor | None  # what LoftQ changes in the base weight

    _first = staticmethod(inits.first_weights)

    def __init__(self, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(lora_A)  # [r, in, ...]
        self.lora_B = nn.Parameter(lora_B)  # [out, r, ...]
        for name in ("lora_bias", "magnitude"):
            self.register_parameter(name, None)
        for name in ("start_A", "start_B", "base_change"):
            self.register_buffer(name, None, persistent=False)
        self.scaling = scaling
        self.dropout = dropout
        self.plain = type(self) is Lora  # nothing but A and B on a linear layer

    @classmethod
    def create(cls, base: Any, config: LoraConfig, path: str, shared: None) -> Self:
        if cls is Lora and isinstance(base, (nn.Embedding, *CONVOLUTIONS)):
            kind = LoraEmbedding if isinstance(base, nn.Embedding) else LoraConv
            return kind.create(base, config, path, shared)  # type: ignore[return-value]
        _check(base, config, path)
        r = of_pattern(config.rank_pattern, path, config.r)
        alpha = of_pattern(config.alpha_pattern, path, config.lora_alpha)
        scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        weight = cls._oriented(weight_of(base).detach())
        init, change = config.init_lora_weights, None
        if init == "loftq":
            bits, iterations = config.loftq_config.get("loftq_bits", 4), config.loftq_config.get("loftq_iter", 1)
            held, A, B = loftq(weight, bits, r, iterations)
            B = B / scaling  # PEFT forgets it
            change = held - weight
        else:
            A, B = cls._first(init, weight, r, scaling)
        adapter = cls(A, B, scaling, config.lora_dropout)
        if isinstance(init, str) and (init.startswith("pissa") or init == "olora"):
            adapter.start_A, adapter.start_B = A.clone(), B.clone()
        adapter.base_change = change
        if config.lora_bias:
            adapter.lora_bias = nn.Parameter(zeros(base, len(B)))
        if config.use_dora:
            adapter.magnitude = nn.Parameter(cls._columns(adapter._norm(base), weight))
        more = (adapter.start_A, adapter.base_change, adapter.lora_bias, adapter.magnitude)
        adapter.plain = adapter.plain and all(part is None for part in more)
        return adapter

    @staticmethod
    def _oriented(weight: Tensor) -> Tensor:
        """The base weight as A and B have it: [out, in, ...]."""
        return weight

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Return y + s B A x, for x [..., in] and y [..., out]."""
        # Straight from the dict and by identity: each nn.Module attribute costs as much as a small kernel on a CPU.
        A, B = self._parameters["lora_A"], self._parameters["lora_B"]
        assert A is not None
        assert B is not None
        if not self.plain:
            return self._forward(x, y, base)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return add_low_rank(y, x, A, B, self.scaling)

    def _forward(self, x: Tensor, y: Tensor, base: Any) -> Tensor:
        """The same with all that LoRA can have beside A and B."""
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training and x.is_floating_point() else x
        update = self._product(dropped, base, self.lora_A, self.lora_B, y.dtype)
        if self.start_A is not None:
            update = update - self._product(x, base, self.start_A, self.start_B, y.dtype)
        if self.lora_bias is not None:
            update = update + self._columns(self.lora_bias.to(y.dtype), y)
        update = self.scaling * update
        if self.base_change is not None:
            y = y + apply_weight(base, x, self.base_change)
        if self.magnitude is None:
            return y + update
        bias = None if isinstance(base, nn.Embedding) else base.bias
        offset = 0 if bias is None else self._columns(bias, y)
        return self._columns(self._stretch(base).to(y.dtype), y) * (y - offset + update) + offset

    def _product(self, x: Tensor, base: nn.Module, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
        """B A x."""
        return F.linear(F.linear(x, A.to(x.dtype)), B.to(dtype))

    @staticmethod
    def _columns(values: Tensor, y: Tensor) -> Tensor:
        """One value [out] per output feature, to multiply or add to y."""
        return values

    def _factors(self) -> tuple[Tensor, Tensor]:
        """A and B as matrices, with the start subtracted where there is one."""
        A, B = self.lora_A.flatten(1), self.lora_B.flatten(1)
        if self.start_A is None:
            return A, B
        return inits.as_plain(A, B, self.start_A.flatten(1), self.start_B.flatten(1))

    def _norm(self, base: Any) -> Tensor:
        """The norm [out] of each row of W + s B A."""
        W = self._oriented(weight_of(base)).flatten(1).to(self.lora_A.dtype)
        W = W if self.base_change is None else W + self.base_change.flatten(1)
        A, B = self._factors()
        return row_norms(W, A.detach(), B.detach(), self.scaling)

    def _stretch(self, base: nn.Module) -> Tensor:
        """DoRA's factor of each row, [out]. Its section 4.3: the norm counts as a constant in the backward pass."""
        assert self.magnitude is not None
        return self.magnitude.flatten() / self._norm(base).detach()

    def delta_weight(self, base: nn.Module) -> Tensor:
        """Return s B A, in the shape of the base weight."""
        A, B = self._factors()
        delta = (self.scaling * (B @ A)).reshape(len(B), *self.lora_A.shape[1:])
        return self._oriented(delta if self.base_change is None else delta + self.base_change)

    def merged_weight(self, weight: Tensor, base: nn.Module) -> Tensor:
        weight = weight + self.delta_weight(base)
        if self.magnitude is None:
            return weight
        stretch = self._stretch(base)
        return self._oriented(self._oriented(weight) * stretch.reshape(-1, *[1] * (weight.ndim - 1)))

    def merged_bias(self, bias: Tensor | None, base: Any) -> Tensor | None:
        if self.lora_bias is not None:
            added = self.scaling * self.lora_bias
            return added if bias is None else bias + added
        if self.magnitude is not None and bias is not None:  # what other adapters have added to it is stretched too
            return base.bias + self._stretch(base) * (bias - base.bias)
        return bias

    def batch_key(self) -> Hashable:
        """Ranks and scalings of plain LoRAs may differ: short ranks are filled up with zeros."""
        return (Lora, self.dropout if self.training else 0.0) if self.plain else super().batch_key()

    @classmethod
    def forward_rows(cls, adapters: Sequence[Any], group: Group, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Return y_b + s_b B_b A_b x_b for every row b, in two batched products."""
        first = adapters[0]
        if not first.plain:
            return super().forward_rows(adapters, group, x, y, base)
        if first.dropout and first.training:
            x = F.dropout(x, first.dropout)
        all_A: list[Any] = [adapter._parameters["lora_A"] for adapter in adapters]
        all_B: list[Any] = [adapter._parameters["lora_B"] for adapter in adapters]
        scalings = [adapter.scaling for adapter in adapters]
        return add_low_rank_by_row(y, x, all_A, all_B, scalings, None if group.in_order else group.index)

    @classmethod
    def add_rows(cls, adapters: Sequence[Any], group: Group, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        if not adapters[0].plain or not a_token_each(y, x):
            return super().add_rows(adapters, group, x, y, base)
        all_A: list[Any] = [adapter._parameters["lora_A"] for adapter in adapters]
        all_B: list[Any] = [adapter._parameters["lora_B"] for adapter in adapters]
        return add_to_tokens(y, x, all_A, all_B, [adapter.scaling for adapter in adapters], group.of_each)

    def low_rank(self) -> LowRank:
        """Its update as factors, for add_weighted_adapter. Raises AdapterError where it is more than s B A."""
        if self.magnitude is not None or self.lora_bias is not None or self.base_change is not None:
            message = "Adapters with DoRA, lora_bias or LoftQ are more than a low-rank update."
            raise AdapterError("Cannot combine these adapters", message, "Combine plain LoRA adapters.")
        A, B = self._factors()
        B = B.reshape(*B.shape, *self.lora_B.shape[2:])
        return LowRank(A.reshape(len(A), *self.lora_A.shape[1:]), B, self.scaling)

    @classmethod
    def combined(cls, adapters: Sequence[Self], weights: Sequence[float], kind: str, **settings: Any) -> Self:
        """A new adapter from some of one layer; see low_rank.combine."""
        A, B, scaling = combine([adapter.low_rank() for adapter in adapters], weights, kind, **settings)
        return cls(A, B, scaling, adapters[0].dropout)

    def extra_repr(self) -> str:
        return f"r={self.lora_A.shape[0]}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class LoraConv(Lora):
    """LoRA on a convolution: A [r, in, *kernel] with the layer's stride and padding, then B [out, r, 1, ...]."""

    def _product(self, x: Tensor, base: nn.Module, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
        hidden = apply_weight(base, x, A)  # [batch, r, ...]
        return torch.einsum("br...,or->bo...", hidden, B.flatten(1).to(hidden.dtype))

    @staticmethod
    def _columns(values: Tensor, y: Tensor) -> Tensor:
        return values.reshape(1, -1, *[1] * (y.ndim - 2))


class LoraEmbedding(Lora):
    """LoRA on an embedding: A [r, vocabulary], B [dim, r]; a token's update is s B A[:, token]."""

    file_names: ClassVar[dict[str, str]] = {
        **Lora.file_names,
        "lora_A": "lora_embedding_A",
        "lora_B": "lora_embedding_B",
    }

    @staticmethod
    def _first(init: bool | str, weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
        if init is True or init is False:
            A, B = inits.embedding(weight, r)
            return (A, B) if init else (nn.init.normal_(A), B)
        return inits.first_weights(init, weight, r, scaling)

    @staticmethod
    def _oriented(weight: Tensor) -> Tensor:
        return weight.t()

    def _product(self, x: Tensor, base: nn.Module, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
        return F.linear(apply_weight(base, x, A.t()).to(dtype), B.to(dtype))  # with the base's scale of embeddings


def _check(base: nn.Module, config: LoraConfig, path: str) -> None:
    refuse_groups(base, path)
    if config.lora_bias and isinstance(base, nn.Embedding):
        message = f"{path} is an embedding, which has no bias."
        raise AdapterError("lora_bias", message, "Leave it out, or switch lora_bias off.")
    if config.init_lora_weights == "loftq" and quantised.is_quantised(base):
        message = f"{path} is quantised already, and LoftQ needs the weight that it was made of."
        raise AdapterError("LoftQ needs the original weight", message, "See replace_lora_weights_loftq.")
