"""LoRA on the experts of a mixture, stored in one parameter [E, ...] each (PEFT's `target_parameters`), factored.

    y = W_e x + s B_e A_e x        for a token x that is routed to expert e; A_e [r, in], B_e [out, r]

PEFT rebuilds all of W + s B A, the size of the expert weights, in every forward pass. Here only the tokens that reach
an expert meet its factors, so the update costs what a low-rank product costs, and its gradients are of A's and B's
size.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nbtune.errors import AdapterError
from nbtune.peft.configs.lora import LoraConfig
from nbtune.peft.layer import Replacement
from nbtune.peft.rows import Group
from nbtune.peft.targets import of_pattern

# What PEFT refuses for parameters too: its update is on the weight, so there is no input to drop or to look at.
_REFUSED = (
    *("lora_dropout", "fan_in_fan_out", "lora_bias", "use_dora", "velora_config", "kasa_config", "use_qalora"),
    *("alora_invocation_tokens", "arrow_config", "use_bdlora", "monteclora_config"),
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class LoraExperts(Replacement):
    """Low-rank updates of one or more expert parameters of a module, by the parameters' names.

    Serves the experts of transformers 5 (all models with `use_experts_implementation`: Mixtral, Qwen, DeepSeek, gpt-oss
    and 60 others) and of Llama 4. Older models have a Linear for each expert and need nothing of this.
    """

    bases: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)

    def __init__(
        self, lora_A: Mapping[str, Tensor], lora_B: Mapping[str, Tensor], scaling: Mapping[str, float], transposed: bool
    ) -> None:
        super().__init__()
        self.lora_A = nn.ParameterDict({name: nn.Parameter(A) for name, A in lora_A.items()})  # each [E, r, in]
        self.lora_B = nn.ParameterDict({name: nn.Parameter(B) for name, B in lora_B.items()})  # each [E, out, r]
        self.scaling = dict(scaling)
        self.transposed = transposed  # whether the update of a weight is (B A)^T, of shape [E, in, out]

    @classmethod
    def create(cls, base: nn.Module, config: LoraConfig, path: str, parameters: Sequence[str]) -> Self:
        """A new adapter for some parameters, each [E, out, in] or [E, in, out], of the experts module at `path`.

        A pattern for ranks or alphas is matched against `<path>.<parameter>`. Raises AdapterError for a module whose
        computation is not known, for quantised weights, and for settings that have no meaning here.
        """
        _check(base, config, path, parameters)
        transposed = vars(base).get("is_transposed", False)
        lora_A, lora_B, scaling = {}, {}, {}
        # In the order in which the module has them, on which the names in a file depend.
        for name in (name for name in base._parameters if name in parameters):
            weight = base.get_parameter(name)
            r = of_pattern(config.rank_pattern, f"{path}.{name}", config.r)
            alpha = of_pattern(config.alpha_pattern, f"{path}.{name}", config.lora_alpha)
            experts, *sizes = weight.shape
            in_size, out_size = sizes if transposed else reversed(sizes)
            dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
            A = torch.empty(experts * r, in_size, dtype=dtype, device=weight.device)
            B = torch.zeros(out_size, r * experts, dtype=dtype, device=weight.device)
            if config.init_lora_weights == "gaussian":
                nn.init.normal_(A, std=1 / r)
            else:
                nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            if config.init_lora_weights is False:
                nn.init.kaiming_uniform_(B, a=math.sqrt(5))
            lora_A[name], lora_B[name] = _from_file(A, B, experts)
            scaling[name] = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        return cls(lora_A, lora_B, scaling, transposed)

    def factors(self, name: str, dtype: torch.dtype, reverse: bool) -> tuple[Tensor, Tensor]:
        """What a token is multiplied by: [E, in, r], then [E, r, out]; the scaling is not in them.

        `reverse` where PEFT, and so the file, takes a weight [E, in, out] for [E, out, in]: in Llama 4.
        """
        A, B = self.lora_A[name].to(dtype), self.lora_B[name].to(dtype)
        return (B, A) if reverse else (A.mT, B.mT)

    @classmethod
    def forward_several(cls, adapters: Sequence[Self], base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The experts' output [tokens, hidden] for x [tokens, hidden], with all these adapters active."""
        return experts_forward(base, adapters, None, x, *args, **kwargs)

    @classmethod
    def forward_each(
        cls, adapters: Sequence[Self], group: Group, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The same, token t with `adapters[group.which[t]]` or, where that is -1, with none."""
        return experts_forward(base, adapters, group.index, x, *args, **kwargs)

    @torch.no_grad()
    def merged_parameters(self, base: nn.Module) -> dict[str, Tensor]:
        """The weights, by name and in the base's shape and precision, of plain experts that compute the same."""
        merged = {}
        for name, weight in ((name, base.get_parameter(name).detach().clone()) for name in self.lora_A):
            for matrix, A, B in zip(weight, self.lora_A[name], self.lora_B[name], strict=True):
                delta = self.scaling[name] * (B @ A)
                matrix.copy_(matrix + (delta.mT if self.transposed else delta))
            if not torch.isfinite(weight).all():
                message = f"The merged {name} would hold inf or nan."
                raise AdapterError("Cannot merge", message, "Is the adapter trained well?")
            merged[name] = weight
        return merged

    def merged_module(self, module: nn.Module) -> nn.Module:
        """A copy of the experts with merged weights; it shares everything else with `module`, which stays as it is."""
        clone = copy.copy(module)
        clone.__dict__["_parameters"] = dict(module._parameters)
        for name, weight in self.merged_parameters(module).items():
            clone._parameters[name] = nn.Parameter(weight, requires_grad=module.get_parameter(name).requires_grad)
        return clone

    def saved(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's names and shapes since its version 0.19: lora_A.weight [E*r, in], lora_B.weight [out, r*E].

        The parameter's name is not in the file: the last parameter of the module is the outermost there, the one
        before it has `base_layer.` before its names, and so on.
        """
        tensors = {}
        for name, prefix in self._prefixes().items():
            tensors[f"{prefix}lora_A.weight"] = state[f"lora_A.{name}"].flatten(0, 1)
            tensors[f"{prefix}lora_B.weight"] = state[f"lora_B.{name}"].permute(1, 2, 0).flatten(1)
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors under the names of `saved`, of PEFT's present or its old layout; those not given stay."""
        tensors = {**self.saved(self.own_state()), **self.of_this_layout(tensors)}
        for name, prefix in self._prefixes().items():
            A, B = tensors[f"{prefix}lora_A.weight"], tensors[f"{prefix}lora_B.weight"]
            for own, new in zip((self.lora_A[name], self.lora_B[name]), _from_file(A, B, len(own_A)), strict=True):
                own.data.copy_(new)

    def of_this_layout(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file, in the present layout also where they come from PEFT 0.17 or 0.18.

        Those took every weight for [E, in, out], so that A and B have each other's place where it is [E, out, in]. No
        version in the file says so, but the shapes do, and one parameter's speak for the module's others. Where in = out
        for all of them nothing speaks, and the present layout is assumed.
        """
        own = {name: (self.lora_A[name], self.lora_B[name]) for name in self.lora_A}
        return dict(tensors)

    def _prefixes(self) -> dict[str, str]:
        """What stands before a parameter's tensors in a file, by the parameter's name."""
        return {name: "base_layer." * depth for depth, name in enumerate(reversed(list(self.lora_A)))}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: r={A.shape[1]}, scaling={self.scaling[name]:g}" for name, A in self.lora_A.items())
