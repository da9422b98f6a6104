"""LoRA on the experts of a mixture, each projection one parameter of all experts (PEFT's `target_parameters`).

    y = W_e x + s B_e A_e x        for a token x that is routed to expert e; A_e [r, in], B_e [out, r]

PEFT builds W + s B A of all experts in every forward pass; here the tokens of an expert meet its low-rank factors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from nbtune.errors import AdapterError
from nbtune.kernels import low_rank_inits as inits
from nbtune.kernels.experts import experts_forward
from nbtune.kernels.low_rank import LowRank
from nbtune.modules.paths import of_pattern
from nbtune.modules.row_groups import Group
from nbtune.peft.configs.lora import LoraConfig
from nbtune.peft.layer import Replacement

# What PEFT refuses for parameters, in its words or by an error.
_REFUSED = (
    *("lora_dropout", "lora_bias", "use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "velora_config"),
    *("kasa_config", "arrow_config", "monteclora_config", "alora_invocation_tokens"),
)


class LoraExperts(Replacement):
    """Low-rank updates of a module's expert projections, by the names of the parameters.

    Serves what transformers 5 marks with `use_experts_implementation` (Mixtral, Qwen, DeepSeek, gpt-oss and 60 others)
    and Llama 4. Experts that are modules of Linears have no use for it.
    """

    bases: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.lora_A = nn.ParameterDict()  # each [E, r, in]
        self.lora_B = nn.ParameterDict()  # each [E, out, r]
        self.scaling: dict[str, float] = {}  # in the module's order of parameters
        self.transposed = transposed  # whether the update of a weight is (B A)^T, [E, in, out]

    @classmethod
    def create(cls, base: nn.Module, config: LoraConfig, path: str, shared: Sequence[str]) -> Self:
        """A new adapter for the experts at `path`; `shared` are the names of parameters, [E, out, in] or [E, in, out].

        Patterns of ranks and alphas are matched against `<path>.<parameter>`. Raises AdapterError for a module whose
        computation is not known, for quantised weights, and for settings that experts cannot have.
        """
        _check(base, config, path, shared)
        adapter = cls(transposed=vars(base).get("is_transposed", False))
        for name in filter(shared.__contains__, base._parameters):
            weight = base.get_parameter(name)
            r = of_pattern(config.rank_pattern, f"{path}.{name}", config.r)
            alpha = of_pattern(config.alpha_pattern, f"{path}.{name}", config.lora_alpha)
            experts = len(weight)
            A, B = inits.default(weight[0].mT if adapter.transposed else weight[0], experts * r)
            if config.init_lora_weights == "gaussian":
                nn.init.normal_(A, std=1 / r)
            if config.init_lora_weights is False:
                nn.init.kaiming_uniform_(B, a=math.sqrt(5))
            adapter.lora_A[name], adapter.lora_B[name] = map(nn.Parameter, _by_expert(A, B, experts))
            adapter.scaling[name] = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        return adapter

    @classmethod
    def forward_several(cls, adapters: Sequence[Self], base: nn.Module, x: Tensor, *args: Any) -> Tensor:
        """The experts' output [tokens, hidden] for x [tokens, hidden], with all these adapters active."""
        return experts_forward(base, [adapter.factors() for adapter in adapters], None, x, *args)

    @classmethod
    def forward_each(cls, adapters: Sequence[Self], group: Group, base: nn.Module, x: Tensor, *args: Any) -> Tensor:
        """The same, token t with `adapters[group.which[t]]`, or with none where that is -1."""
        return experts_forward(base, [adapter.factors() for adapter in adapters], group.index, x, *args)

    def factors(self) -> dict[str, LowRank]:
        return {name: LowRank(self.lora_A[name], self.lora_B[name], s) for name, s in self.scaling.items()}

    @torch.no_grad()
    def merged_module(self, module: nn.Module) -> nn.Module:
        """A copy of the experts with merged weights, made expert by expert; it shares the rest with `module`."""
        clone = copy.copy(module)
        clone.__dict__["_parameters"] = dict(module._parameters)
        for name, scaling in self.scaling.items():
            weight = module.get_parameter(name)
            merged = weight.clone()
            for matrix, A, B in zip(merged, self.lora_A[name], self.lora_B[name], strict=True):
                delta = scaling * (B @ A)
                matrix.copy_(matrix + (delta.mT if self.transposed else delta))
            if not torch.isfinite(merged).all():
                message = f"The merged {name} of the experts would hold inf or nan."
                raise AdapterError("Cannot merge", message, "Is the adapter trained well?")
            clone._parameters[name] = nn.Parameter(merged, requires_grad=weight.requires_grad)
        return clone

    def saved(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's names and, since its version 0.19, shapes: lora_A.weight [E*r, in], lora_B.weight [out, r*E].

        They are those of the module's last parameter; each one before it has one more `base_layer.` in front.
        """
        tensors = {}
        for name, (key_A, key_B) in self._keys().items():
            tensors[key_A] = state[f"lora_A.{name}"].flatten(0, 1)
            tensors[key_B] = state[f"lora_B.{name}"].permute(1, 2, 0).flatten(1)
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors under the names of `saved`, in PEFT's present or old layout; those not given stay."""
        tensors = {**self.saved(self.own_state()), **self.of_this_layout(tensors)}
        for name, (key_A, key_B) in self._keys().items():
            A, B = _by_expert(tensors[key_A], tensors[key_B], len(self.lora_A[name]))
            self.lora_A[name].copy_(A)
            self.lora_B[name].copy_(B)

    def of_this_layout(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file, in the present layout also if they come from PEFT 0.17 or 0.18.

        Those took every weight for [E, in, out]; where it is [E, out, in], A and B have each other's place. The file
        has no mark of it, but the shapes tell, and one parameter's for the module's others. If in = out for all of
        them, nothing tells, and the present layout is assumed.
        """
        old, certain = {}, False
        for name, (key_A, key_B) in self._keys().items():
            (experts, r, in_size), out_size = self.lora_A[name].shape, self.lora_B[name].shape[1]
            shapes = [tensors[key].shape for key in (key_A, key_B) if key in tensors]
            if shapes == [(experts * r, out_size), (in_size, r * experts)] and not self.transposed:
                certain |= in_size != out_size
                A, B = _by_expert(tensors[key_A], tensors[key_B], experts)  # [E, r, out], [E, in, r]
                old |= {key_A: B.mT.flatten(0, 1), key_B: A.permute(2, 1, 0).flatten(1)}
        return {**tensors, **old} if certain else dict(tensors)

    def _keys(self) -> dict[str, tuple[str, str]]:
        """The names of A and B in a file, by the parameter's name."""
        prefixes = {name: "base_layer." * depth for depth, name in enumerate(reversed(self.scaling))}
        return {name: (f"{prefix}lora_A.weight", f"{prefix}lora_B.weight") for name, prefix in prefixes.items()}


def _by_expert(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """[E, r, in] and [E, out, r] of a file's A [E*r, in] and B [out, r*E]."""
    return A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1).contiguous()


def _check(base: nn.Module, config: LoraConfig, path: str, parameters: Sequence[str]) -> None:
    """Raise AdapterError where `LoraExperts` cannot serve these parameters, or not with these settings."""
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts  # late: only mixtures need it

    # transformers' mark leaves these attributes in an experts module; without them its computation is not known.
    marked = "has_gate" in vars(base) and not vars(base)["_is_expert_parallel"]
    weights = {name: base._parameters.get(name) for name in ("gate_up_proj", "up_proj", "down_proj")}
    known = [name for name, w in weights.items() if w is not None and w.is_floating_point() and w.itemsize > 1]
    if not set(parameters).issubset(known) or not (marked or isinstance(base, Llama4TextExperts)):
        names = ", ".join(f"{path}.{name}" for name in parameters)
        message = f"{names}: of a {type(base).__name__}, nbtune can adapt {', '.join(known) or 'nothing'}."
        remedy = "Name only projections that hold whole experts, in 16 bits or more, and that nbtune knows."
        raise AdapterError("Not an expert projection", message, remedy)
    refused = [name for name in _REFUSED if vars(config)[name]]
    refused += ["init_lora_weights"] if config.init_lora_weights not in (True, False, "gaussian") else []
    for name in refused:
        message = f"{name} is {vars(config)[name]!r}, which the experts in {path} cannot have."
        raise AdapterError(f"{name} does not go with target_parameters", message, f"Leave {name} at its default.")
