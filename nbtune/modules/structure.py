"""What a model's modules are, told by how it is built: the projections, norms, keys and values of its repeated blocks.

For the models that PEFT's tables miss. All functions take a model and its modules by path, parents before children,
and give paths in the model's order. Nothing reads a weight, so they work on the meta device.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from nbtune._transformers import PreTrainedModel
from nbtune.errors import AdapterError
from nbtune.modules.base import CONVOLUTIONS, LINEARS, features

Modules = Mapping[str, nn.Module]


def projections(model: nn.Module, modules: Modules) -> list[str]:
    """The linear layers of attention and MLP in the blocks of the text model.

    Left out are the towers and projectors of other modalities, heads, routers and gates of experts, linear layers that
    share an embedding's weight, and those whose weight is read by a fused kernel, which would pass an adapter by.
    """
    modules = _of_text(model, modules)
    stacks = _stacks(modules)
    tied = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
    left_out = [*_routers(modules, stacks), *_read_raw(modules)]
    return [
        path
        for path, module in modules.items()
        if isinstance(module, LINEARS)
        and _within(path, stacks)
        and not _within(path, left_out)
        and id(module.weight) not in tied
    ]


def norms(model: nn.Module, modules: Modules) -> list[str]:
    """The norms in the text model's blocks and beside its lists of blocks, such as the last one before the head."""
    modules = _of_text(model, modules)
    stacks = _stacks(modules)
    beside = {_parent(stack) for stack in stacks}
    routers = _routers(modules, stacks)
    children = _children(modules)
    return [
        path
        for path, module in modules.items()
        if not children[path]
        and module._parameters.get("weight") is not None
        and all(parameter.ndim == 1 for parameter in module.parameters())
        and (_within(path, stacks) or _parent(path) in beside)
        and not _within(path, routers)
    ]


def values(model: nn.Module, modules: Modules) -> list[str]:
    """The projections to the values of attention, alone or fused with others; all projections where none is known."""
    found = projections(model, modules)
    return [path for path in found if projects_to(path, "value")] or found


def keys_and_values(model: nn.Module, modules: Modules) -> list[str]:
    """The projections to the keys and values of attention, alone or fused; all projections where none is known."""
    found = projections(model, modules)
    return [path for path in found if _is_key_or_value(path)] or found


def last_of_mlp(model: nn.Module, modules: Modules) -> list[str]:
    """The last projection of each MLP: back to the width of its block, not beside a key or value."""
    found = projections(model, modules)
    of_attention = {_parent(path) for path in found if _is_key_or_value(path)}
    last = []
    for stack in _stacks(_of_text(model, modules)):
        sizes = {path: features(modules[path]) for path in found if _within(path, [stack])}
        width = Counter(in_ for _, in_ in sizes.values()).most_common(1)[0][0] if sizes else 0
        last += [
            path
            for path, (out, in_) in sizes.items()
            if out == width and in_ != width and _parent(path) not in of_attention
        ]
    return last


def _of_text(model: nn.Module, modules: Modules) -> Modules:
    """The modules of the text model: those whose nearest model of transformers has the text's config. Or else all."""
    if not isinstance(model, PreTrainedModel):
        return modules
    text = type(model.config.get_text_config(decoder=True))
    owners: dict[str, PreTrainedModel] = {"": model}
    for path, module in modules.items():
        owners[path] = module if isinstance(module, PreTrainedModel) else owners[_parent(path)]
    of_text = {path: module for path, module in modules.items() if type(owners[path].config) is text}
    stacks = _stacks(of_text)
    has_blocks = any(isinstance(module, LINEARS) and _within(path, stacks) for path, module in of_text.items())
    return of_text if has_blocks else modules


def _stacks(modules: Modules) -> list[str]:
    """The outermost lists of blocks: a ModuleList of modules that hold others, or a Sequential of several alike."""
    children = _children(modules)
    stacks: list[str] = []
    for path, module in modules.items():
        members = [member for member in children[path] if children[member]]
        alike = len(members) > 1 and len({type(modules[member]) for member in children[path]}) == 1
        is_stack = bool(members) if isinstance(module, nn.ModuleList) else alike and isinstance(module, nn.Sequential)
        if is_stack and not _within(path, stacks):
            stacks.append(path)
    return stacks


def _routers(modules: Modules, stacks: list[str]) -> list[str]:
    """What stands beside experts and puts out a width that none of them and none of its neighbours takes.

    A router puts out a score for each expert, the gate of a shared expert one score for all; whatever takes part in
    the layer's own computation puts out a width that another one takes.
    """
    children = _children(modules)
    linears = {path: features(module) for path, module in modules.items() if isinstance(module, LINEARS)}
    routers = []
    for members in children.values():
        experts = [path for path in members if _within(path, stacks) and _are_experts(modules, path, children[path])]
        if not experts:
            continue
        sizes = {member: [size for path, size in linears.items() if _within(path, [member])] for member in members}
        taken = {of_member[0][1] for of_member in sizes.values() if of_member}
        for path in experts:
            taken.update(width for size in sizes[path] for width in size)
            taken.update(width for stacked in _stacked_matrices(modules[path]) for width in stacked.shape[1:])
        routers += [
            member
            for member, of_member in sizes.items()
            if of_member and member not in experts and not any(out in taken for out, _ in of_member)
        ]
    return routers


def _are_experts(modules: Modules, path: str, members: list[str]) -> bool:
    """Whether a module holds experts: matrices stacked in one weight [experts, ., .], or a list of modules alike."""
    module = modules[path]
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return len(members) > 1 and len({type(modules[member]) for member in members}) == 1
    return not isinstance(module, CONVOLUTIONS) and any(min(stacked.shape) > 1 for stacked in _stacked_matrices(module))


def _stacked_matrices(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 3]


def _read_raw(modules: Modules) -> list[str]:
    """Linear layers that are not called: in a Mamba mixer all but the first, and in torch's MultiheadAttention."""
    children = _children(modules)
    raw = []
    for path, module in modules.items():
        linears = [child for child in children[path] if isinstance(modules[child], LINEARS)]
        if module._parameters.keys() >= {"A_log", "D"}:  # the state matrix and the skip of Mamba (arXiv:2312.00752)
            raw += linears[1:]
        elif isinstance(module, nn.MultiheadAttention):
            raw += linears
    return raw


def refuse_uncalled(modules: Modules, paths: Iterable[str]) -> None:
    """Raise AdapterError where one of the paths is a layer whose weight is read past it, and an adapter with it.

    PEFT refuses those of Mamba, too, but for dt_proj; one in MultiheadAttention it adapts in a way of its own.
    """
    for path in paths:
        parent = modules.get(_parent(path))
        mixer = parent is not None and parent._parameters.keys() >= {"A_log", "D"}
        if isinstance(parent, nn.MultiheadAttention) or (mixer and path.endswith((".out_proj", ".conv1d", ".dt_proj"))):
            message = f"{path} is not called: {type(parent).__name__} reads its weight, and would pass an adapter by."
            raise AdapterError("A layer that is not called", message, "Name it in exclude_modules.")


def _is_key_or_value(path: str) -> bool:
    return projects_to(path, "key") or projects_to(path, "value")


def projects_to(path: str, role: str) -> bool:
    """Whether a layer's name has the role in it: Wk, k_proj, key, kv_b_proj, in_proj_qkvz, query_key_value, c_attn."""
    name = path.rpartition(".")[2].lower()
    letters = re.compile(rf"w?[qkvz]*{role[0]}[qkvz]*")
    return name == "c_attn" or any(word == role or letters.fullmatch(word) for word in name.split("_"))


def _children(modules: Modules) -> dict[str, list[str]]:
    children: dict[str, list[str]] = {path: [] for path in modules}
    for path in modules:
        children.setdefault(_parent(path), []).append(path)
    return children


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _within(path: str, roots: Iterable[str]) -> bool:
    """Whether a path is one of the roots or below one."""
    return f"{path}.".startswith(tuple(f"{root}." for root in roots))
