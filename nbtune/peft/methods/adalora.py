"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning. Zhang et al. 2023, arXiv:2303.10512.

    y = W x + s B diag(E) A x        A [r, in], E [r, 1], B [out, r]; s = alpha / r

is kept near a singular value decomposition by a penalty, the mean of |A A' - I| and |B' B - I| over all layers. After
each step, the least important of all layers' singular values are set to zero, until target_r are left on average.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nbtune.errors import AdapterError
from nbtune.kernels.low_rank_update import add_low_rank_by_row
from nbtune.modules.base import LINEARS, apply_weight, empty, refuse_groups, weight_of
from nbtune.modules.row_groups import Group
from nbtune.peft.configs.lora import AdaLoraConfig
from nbtune.peft.layer import Adapter, Several

_FACTORS = ("lora_A", "lora_B", "lora_E")


class AdaLora(Adapter):
    """One update as singular values and vectors, and how important each of them has been.

    The buffers `importance_*` belong to training: they are in no adapter's file, but in the checkpoints of a run.
    """

    bases: ClassVar[tuple[type[nn.Module], ...]] = (*LINEARS, nn.Conv2d)
    penalises: ClassVar[bool] = True
    scheduled: ClassVar[bool] = True
    importance_mask: Tensor  # [r] the ranks that are left

    def __init__(self, A: Tensor, B: Tensor, E: Tensor, scaling: float, dropout: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.lora_E = nn.Parameter(A), nn.Parameter(B), nn.Parameter(E)
        self.scaling = scaling
        self.dropout = dropout
        self.register_buffer("importance_mask", torch.ones(len(A), dtype=torch.bool, device=A.device), persistent=False)

    @classmethod
    def share(cls, config: AdaLoraConfig, bases: Mapping[str, Any]) -> None:
        planned = any(base.weight.is_meta for base in bases.values())  # a model without weights is not trained
        if config.total_step is None and not config.inference_mode and not planned:
            message = "Its schedule needs to know how many optimiser steps there will be."
            raise AdapterError("AdaLoRA needs total_step", message, "Give total_step; a run of nbtune fills it in.")

    @classmethod
    def create(cls, base: Any, config: AdaLoraConfig, path: str, shared: None) -> Self:
        refuse_groups(base, path)
        kept = _masks(config).get(path)
        r, weight = config.init_r if kept is None else sum(kept), weight_of(base)
        A, B, E = empty(base, r, weight[0].numel()), empty(base, len(weight), r), empty(base, r, 1)
        std = 0.02 if config.init_lora_weights else 1.0
        E = E.zero_() if config.init_lora_weights else E.normal_()
        # PEFT's small number included; ranks that are taken away do not change the scale.
        scaling = config.lora_alpha / (config.init_r + 1e-5)
        adapter = cls(A.normal_(std=std), B.normal_(std=std), E, scaling, config.lora_dropout)
        if not config.inference_mode:
            for name in _FACTORS:  # averages of |w * gradient|, and of how far it is from its average
                for kind in ("mean", "spread"):
                    zeros = torch.zeros_like(adapter.get_parameter(name), requires_grad=False)
                    adapter.register_buffer(f"importance_{kind}_{name}", zeros, persistent=False)
        return adapter

    def saved(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Without the ranks that are taken away."""
        if self.importance_mask.is_meta or self.importance_mask.all():
            return dict(state)
        kept = {name: tensor[self.importance_mask] for name, tensor in state.items() if name != "lora_B"}
        return {**kept, "lora_B": state["lora_B"][:, self.importance_mask]}

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        x = F.dropout(x, self.dropout) if self.dropout and self.training else x
        if isinstance(base, nn.Conv2d):
            return y + apply_weight(base, x, self.delta_weight(base))
        hidden = F.linear(x, (self.scaling * self.lora_E * self.lora_A).to(x.dtype))
        return y + F.linear(hidden, self.lora_B.to(x.dtype))

    def delta_weight(self, base: nn.Module) -> Tensor:
        """Return s B diag(E) A."""
        return (self.scaling * (self.lora_B @ (self.lora_E * self.lora_A))).view(weight_of(base).shape)

    def batch_key(self) -> Hashable:
        """Ranks may differ: short ones are filled up with zeros."""
        return (type(self), self.dropout if self.training else 0.0, self.lora_A.shape[1])

    @classmethod
    def forward_rows(cls, adapters: Sequence[Any], group: Group, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        all_A, all_B = [one.lora_E * one.lora_A for one in adapters], [one.lora_B for one in adapters]
        first, scalings = adapters[0], [one.scaling for one in adapters]
        if not isinstance(base, nn.Conv2d):
            x = F.dropout(x, first.dropout) if first.dropout and first.training else x
            return add_low_rank_by_row(y, x, all_A, all_B, scalings, group.index)
        weights = [(s * B @ A).view(base.weight.shape) for s, A, B in zip(scalings, all_A, all_B, strict=True)]
        return y + torch.cat([apply_weight(base, x[row : row + 1], weights[n]) for row, n in enumerate(group.which)])

    @classmethod
    def penalty(cls, adapters: Mapping[str, Adapter], config: AdaLoraConfig) -> Tensor:
        """How far A and B are from orthogonal."""
        grams = [
            gram for one in _own(adapters).values() for gram in (one.lora_A @ one.lora_A.T, one.lora_B.T @ one.lora_B)
        ]
        norms = [torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device)) for gram in grams]
        return config.orth_reg_weight * torch.stack(norms).mean()

    @classmethod
    @torch.no_grad()
    def after_step(cls, adapters: Mapping[str, Adapter], config: AdaLoraConfig, step: int) -> None:
        """Follow the importance of each rank; take ranks away as the schedule says."""
        own = list(_own(adapters).values())
        if config.total_step is None or not all(one.lora_E.requires_grad for one in own):
            return
        last = config.total_step - config.tfinal
        if step < last:
            for one in own:
                one._follow(config.beta1, config.beta2)
        if step == last or (config.tinit < step < last and step % config.deltaT == 0):
            left = max(0.0, 1 - (step - config.tinit) / (last - config.tinit)) ** 3
            first, final = sum(len(one.lora_A) for one in own), config.target_r * len(own)
            scores = [one._scores() for one in own]
            taken = first - int((first - final) * left + final)
            threshold = torch.cat(scores).kthvalue(taken).values if taken > 0 else -torch.inf
            for one, score in zip(own, scores, strict=True):
                one.importance_mask.copy_(score > threshold)
        for one in own:
            if step >= last or (config.tinit < step and step % config.deltaT == 0):
                one.lora_E.masked_fill_(~one.importance_mask[:, None], 0.0)

    def _follow(self, beta1: float, beta2: float) -> None:
        """One step of the averages: eq. 9 and 10 of the paper."""
        for name in _FACTORS:
            weight = self.get_parameter(name)
            if weight.grad is None:
                continue
            importance = (weight * weight.grad).abs()
            mean, spread = self.get_buffer(f"importance_mean_{name}"), self.get_buffer(f"importance_spread_{name}")
            mean.mul_(beta1).add_(importance, alpha=1 - beta1)
            spread.mul_(beta2).add_((importance - mean).abs(), alpha=1 - beta2)

    def _scores(self) -> Tensor:
        """The importance of each rank [r]: its singular value's, and the means over its two vectors."""
        scores = {
            name: self.get_buffer(f"importance_mean_{name}") * self.get_buffer(f"importance_spread_{name}")
            for name in _FACTORS
        }
        return scores["lora_E"][:, 0] + scores["lora_A"].mean(1) + scores["lora_B"].mean(0)

    @classmethod
    def stored_config(cls, adapters: Mapping[str, Adapter], config: AdaLoraConfig) -> AdaLoraConfig:
        """With the ranks that are left, counted as at the very start, also of an adapter that was loaded."""
        before, pattern = _masks(config), {}
        for path, one in _own(adapters).items():
            kept = iter(one.importance_mask.tolist())
            pattern[f"{path}.lora_E"] = [old and next(kept) for old in before.get(path, [True] * config.init_r)]
        trimmed = any(not all(mask) for mask in pattern.values())
        return config.replace(rank_pattern=pattern) if trimmed else config


def _own(adapters: Mapping[str, Adapter]) -> dict[str, AdaLora]:
    """The AdaLoRA among adapters, which may also be biases or whole modules."""
    parts = {path: adapter.parts if isinstance(adapter, Several) else [adapter] for path, adapter in adapters.items()}
    return {path: part for path, each in parts.items() for part in each if isinstance(part, AdaLora)}


def _masks(config: AdaLoraConfig) -> dict[str, list[bool]]:
    """The ranks that are left, by module path; PEFT's key ends in `.lora_E`, or in that and the adapter's name."""
    return {key.rpartition(".lora_E")[0]: mask for key, mask in (config.rank_pattern or {}).items()}
