"""The one layer that holds adapters, whatever their method.

`AdapterLayer` takes the place of a module of the base model and does once what every method needs: several adapters,
the active ones, disabling, merging and exact unmerging, another adapter per row of a batch. An `Adapter` is one
adapter on one base layer and says only its own equation; see methods/lora.py.

Switching costs the same for 1 and for 64 adapters, on 1 and on 224 layers: all layers of a model share one
`ActiveAdapters`, and a layer looks the active names up when it is next called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nbtune.errors import AdapterError
from nbtune.peft.config import PeftConfig

BASE = "__base__"  # the adapter name of a row that is left to the base model, as in PEFT


class Adapter(nn.Module):
    """One adapter on one base layer.

    Parameters and buffers are the adapter's own; they are stored in a checkpoint as `<module path>.<name>`, unless
    `file_names` gives PEFT's name.
    """

    bases: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    file_names: ClassVar[dict[str, str]] = {}

    @classmethod
    def create(cls, base_layer: nn.Module, config: Any, path: str) -> Self:
        """A new adapter for the base layer at `path`, with its first weights, on the base layer's device."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The adapted output [..., out] for input x [..., in] and the base layer's output y [..., out].

        Without gradients `y` is the adapter's to overwrite: nothing else reads it.
        """
        return y + F.linear(x, self.delta_weight().to(x.dtype))

    def delta_weight(self) -> Tensor:
        """What the adapter adds to the base layer's weight, [out, in], in the adapter's own precision."""
        raise NotImplementedError

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The weight [out, in] of a plain layer that computes the same; in the precision of the adapter."""
        return weight + self.delta_weight()


class SavedModule(Adapter):
    """A full, trained copy of a module (`modules_to_save`): it is called instead of the base, and saved whole."""

    bases = (nn.Module,)

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Rows:
    """The adapter of every row of a batch, for one forward pass or one generation."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._groups: dict[tuple[int, torch.device], tuple[list[tuple[str, Tensor]], Tensor]] = {}

    def groups(self, x: Tensor) -> tuple[list[tuple[str, Tensor]], Tensor]:
        """The rows of x [B, T, in] by adapter name, and the order that undoes the grouping."""
        key = (x.shape[0], x.device)
        if key not in self._groups:
            self._groups[key] = self._group(x)
        return self._groups[key]

    def _group(self, x: Tensor) -> tuple[list[tuple[str, Tensor]], Tensor]:
        rows, repeats = x.shape[0], x.shape[0] // len(self.names)
        # Generation repeats each row for its beams, side by side. A flat [tokens, in] input has no rows to tell apart.
        if x.ndim < 3 or rows != repeats * len(self.names):
            message = f"adapter_names has {len(self.names)} names, but a layer got an input of shape {tuple(x.shape)}."
            raise AdapterError(
                "Rows and adapters differ", message, "Give one name per row, and rows as [batch, tokens]."
            )
        names = [name for name in self.names for _ in range(repeats)]
        groups = {name: [row for row, other in enumerate(names) if other == name] for name in dict.fromkeys(names)}
        order = torch.tensor([row for group in groups.values() for row in group], device=x.device)
        return [(name, torch.tensor(group, device=x.device)) for name, group in groups.items()], order.argsort()


@dataclasses.dataclass(eq=False)
class ActiveAdapters:
    """What all layers of one model share: which adapters there are, and which are on."""

    configs: dict[str, PeftConfig] = dataclasses.field(default_factory=dict)
    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    enabled: bool = True
    rows: Rows | None = None
    # The parameters that adding the first adapter froze; `unload` thaws them.
    frozen: list[nn.Parameter] = dataclasses.field(default_factory=list)
    # The adapters that a layer has to compute: the active ones, less those that are in the base weights already.
    applied: tuple[str, ...] = ()

    def update(
        self, active: tuple[str, ...] | None = None, merged: tuple[str, ...] | None = None, enabled: bool | None = None
    ) -> None:
        """Change what is given. Costs the same for any number of adapters and of layers."""
        self.active = self.active if active is None else active
        self.merged = self.merged if merged is None else merged
        self.enabled = self.enabled if enabled is None else enabled
        self.applied = tuple(name for name in self.active if name not in self.merged) if self.enabled else ()


class AdapterLayer(nn.Module):
    """A module of the base model with its adapters. Unknown attributes are those of the base layer."""

    base_layer: Any  # a module; its `weight` and `bias` are Tensors, which nn.Module does not say
    adapters: nn.ModuleDict

    def __init__(self, base_layer: nn.Module, state: ActiveAdapters) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.state = state
        # The same adapters again, by what a forward pass does with them; a plain dict costs no attribute look-up.
        self._by_name: dict[str, Adapter] = {}
        self._saved: dict[str, nn.Module] = {}
        # The unmerged weight (or module), while adapters are merged; in a tuple, so that it is no parameter of ours.
        self._original: tuple[Any, ...] = ()

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        if "base_layer" not in modules or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(modules["base_layer"], name)

    def add(self, name: str, adapter: Adapter) -> None:
        self.adapters[name] = adapter
        if isinstance(adapter, SavedModule):
            self._saved[name] = adapter.module
        else:
            self._by_name[name] = adapter

    def remove(self, name: str) -> None:
        del self.adapters[name]
        self._by_name.pop(name, None)
        self._saved.pop(name, None)

    def forward(self, x: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        state = self.state
        if state.rows is not None:
            return self._by_row(x, state.rows, args, kwargs)
        module = self._modules["base_layer"]
        for name in state.applied if self._saved else ():
            module = self._saved.get(name, module)
        y = module(x, *args, **kwargs)  # type: ignore[misc]
        for name in state.applied:
            adapter = self._by_name.get(name)  # adapters differ in the layers that they adapt
            if adapter is not None:
                y = adapter(x, y)
        return y

    def _by_row(self, x: Tensor, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if not any(name in self.adapters for name in rows.names):
            return self.base_layer(x, *args, **kwargs)
        groups, order = rows.groups(x)
        y = self.base_layer(x, *args, **kwargs)
        parts = []
        for name, index in groups:
            if name in self._saved:
                parts.append(self._saved[name](x[index], *args, **kwargs))
            elif name in self._by_name:
                parts.append(self._by_name[name](x[index], y[index]))
            else:
                parts.append(y[index])
        return torch.cat(parts)[order]

    def merge(self, names: Sequence[str]) -> None:
        """Put exactly these adapters into the base weights, in this order.

        The weight is replaced, not changed, so that a weight tied to it (an embedding) stays what it was, and `unmerge`
        puts the very same parameter back. Costs the memory of one weight. Raises AdapterError for a weight that would
        hold inf or nan; the layer then is as it was.
        """
        mine = [self.adapters[name] for name in names if name in self.adapters]
        self.unmerge()
        if not mine:
            return
        saved = [adapter.module for adapter in mine if isinstance(adapter, SavedModule)]
        if saved and len(mine) > 1:
            message = "Two of the adapters meet in one layer, and one of them is a whole copy of it (modules_to_save)."
            raise AdapterError("Cannot merge", message, "Merge one of them.")
        if saved:
            self._original = (self.base_layer,)
            self.base_layer = saved[0]
        else:
            self._merge_weight(mine)

    @torch.no_grad()
    def _merge_weight(self, adapters: list[Any]) -> None:
        weight = self.base_layer.weight
        merged = weight.detach()
        for adapter in adapters:
            merged = adapter.merged_weight(merged)
        merged = merged.to(weight.dtype)  # rounded once, after the last adapter
        if not torch.isfinite(merged).all():
            raise AdapterError("Cannot merge", "A merged weight would hold inf or nan.", "Is the adapter trained well?")
        self._original = (weight,)
        self.base_layer.weight = nn.Parameter(merged, requires_grad=weight.requires_grad)

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        if not self._original:
            return
        original = self._original[0]
        if isinstance(original, nn.Parameter):
            now = self.base_layer.weight
            if (original.device, original.dtype) != (now.device, now.dtype):  # the model was moved meanwhile
                original = nn.Parameter(original.detach().to(now.device, now.dtype), requires_grad=now.requires_grad)
            self.base_layer.weight = original
        else:
            self.base_layer = original
        self._original = ()

    def keep_merged(self) -> None:
        """Make the merged weight the base weight for good."""
        self._original = ()

    def extra_repr(self) -> str:
        return f"active={list(self.state.active)}"
