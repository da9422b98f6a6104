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
from torch.nn import functional as F

from nbtune.errors import AdapterError
from nbtune.peft.configs.lora import LoraConfig
from nbtune.peft.layer import Replacement
from nbtune.peft.rows import Group
from nbtune.peft.targets import of_pattern

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
            experts, *sizes = weight.shape
            in_size, out_size = sizes if adapter.transposed else reversed(sizes)
            dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
            A = torch.empty(experts * r, in_size, dtype=dtype, device=weight.device)
            B = torch.zeros(out_size, r * experts, dtype=dtype, device=weight.device)
            if config.init_lora_weights == "gaussian":
                nn.init.normal_(A, std=1 / r)
            else:
                nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            if config.init_lora_weights is False:
                nn.init.kaiming_uniform_(B, a=math.sqrt(5))
            adapter.lora_A[name], adapter.lora_B[name] = map(nn.Parameter, _by_expert(A, B, experts))
            adapter.scaling[name] = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        return adapter

    @classmethod
    def forward_several(cls, adapters: Sequence[Self], base: nn.Module, x: Tensor, *args: Any) -> Tensor:
        """The experts' output [tokens, hidden] for x [tokens, hidden], with all these adapters active."""
        return experts_forward(base, adapters, None, x, *args)

    @classmethod
    def forward_each(cls, adapters: Sequence[Self], group: Group, base: nn.Module, x: Tensor, *args: Any) -> Tensor:
        """The same, token t with `adapters[group.which[t]]`, or with none where that is -1."""
        return experts_forward(base, adapters, group.index, x, *args)

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


def _ends(expert: Tensor, experts: int) -> Tensor:
    """For the experts [S] of some rows, ascending: the row after each expert's last, [E]."""
    return torch.searchsorted(expert, torch.arange(experts, device=expert.device), right=True).int()


def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The rows x [S, in], in the order of their experts, times their expert's part of weight [E, in, out]: [S, out]."""
    # torch's kernel takes no fp64 and wants all rows to be multiples of 16 bytes.
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    modern = x.is_cpu or (x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0))
    if aligned and modern and x.dtype is not torch.float64:
        return F.grouped_mm(x, weight, offs=ends)
    parts = zip(x.split(ends.diff(prepend=ends.new_zeros(1)).tolist()), weight.unbind(), strict=True)
    return torch.cat([rows @ matrix for rows, matrix in parts if len(rows)] or [x @ weight[0]])


def experts_forward(
    base: Any, adapters: Sequence[LoraExperts], which: Tensor | None, x: Tensor, *routing: Tensor
) -> Tensor:
    """The output [T, hidden] of an experts module for x [T, hidden], with the sum of the adapters' updates.

    `routing` is top_k_index [T, k], the experts of each token, and top_k_weights [T, k]. Without it (Llama 4) x is
    weighted already, and holds the tokens once for each expert. With `which` [T] token t gets the update of
    `adapters[which[t]]` only, or none where that is -1.
    """
    experts = len(base.down_proj)
    if routing:
        top_k_index, top_k_weights = routing
    else:
        top_k_index = torch.arange(experts, device=x.device).repeat_interleave(len(x) // experts)[:, None]
        top_k_weights = x.new_ones(top_k_index.shape)
        # The layer took x for the tokens of one row after the other; they are that only within one expert.
        which = None if which is None else which[::experts].repeat(experts)
    expert, order = top_k_index.flatten().sort(stable=True)  # [T*k]: pairs of a token and an expert, by expert
    token = order // top_k_index.shape[1]
    ends = _ends(expert, experts)
    updates: list[tuple[LoraExperts, Any, Tensor]] = [(adapter, None, ends) for adapter in adapters]
    if which is not None:
        parts = [(which[token] == number).nonzero().squeeze(1) for number in range(len(adapters))]
        updates = [(adapters[number], rows, _ends(expert[rows], experts)) for number, rows in enumerate(parts)]

    def project(name: str, x: Tensor) -> Tensor:
        weight = base._parameters[name]
        x = x.to(weight.dtype)
        y = _product(x, weight if not routing or base.is_transposed else weight.mT, ends)
        if routing and base.has_bias:
            y += base._parameters[f"{name}_bias"][expert]
        for adapter, rows, own_ends in (update for update in updates if name in update[0].scaling):
            A, B = adapter.lora_A[name].to(x.dtype), adapter.lora_B[name].to(x.dtype)
            # PEFT, and so the file, takes Llama 4's weights [E, in, out] for [E, out, in].
            first, second = (A.mT, B.mT) if routing else (B, A)  # [E, in, r], [E, r, out]
            hidden = _product(x if rows is None else x[rows], first, own_ends) * adapter.scaling[name]
            change = _product(hidden, second, own_ends)
            y = y.add_(change) if rows is None else y.index_add_(0, rows, change)
        return y

    y = project("gate_up_proj" if not routing or base.has_gate else "up_proj", x[token])
    if routing:
        y = base._apply_gate(y) if base.has_gate else base.act_fn(y)
    else:
        y = base.act_fn(y.chunk(2, dim=-1)[0]) * y.chunk(2, dim=-1)[1]
    y = project("down_proj", y)
    if routing and base.has_post_expert_norm:
        y = base.post_expert_norm(y)
    y = y * top_k_weights.flatten()[order, None]
    # Put back in order and summed, since index_add adds in any order on a GPU.
    return y[order.argsort()].unflatten(0, top_k_index.shape).sum(1).to(x.dtype)
