"""The one layer that holds adapters, whatever their method.

`AdapterLayer` takes the place of a module of the base model and does once what every method needs: several adapters,
the active ones, disabling, merging and exact unmerging, another adapter per row of a batch. An `Adapter` is one
adapter on one base layer and says only its own equation; see methods/lora.py.

Switching costs the same for 1 and for 64 adapters, on 1 and on 224 layers: all layers of a model share one
`ActiveAdapters`, and a layer looks the active names up when it is next called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from nbtune.errors import AdapterError
from nbtune.modules import quantised
from nbtune.modules.base import LINEARS, apply_weight, compute_dtype, weight_of, with_weight
from nbtune.modules.row_groups import Group
from nbtune.modules.stacked import stacked
from nbtune.peft.config import PeftConfig
from nbtune.peft.rows import Rows

BASE = "__base__"  # the adapter name of a row that is left to the base model, as in PEFT
PREFIX = "base_model.model."  # of a module's path in a file


class _Stored(nn.Module):
    """A module whose tensors go into an adapter's file, under PEFT's names."""

    file_names: ClassVar[dict[str, str]] = {}  # by the name here, where PEFT's is another
    repeated: ClassVar[tuple[str, ...]] = ()  # names that PEFT also writes here, of what is elsewhere in its file

    def own_state(self) -> dict[str, Tensor]:
        """Its tensors by name, without those that it shares with other layers."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("shared.")}

    def saved(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the file holds, by name, for these tensors of `own_state`."""
        return {self.file_names.get(name, name): tensor for name, tensor in state.items()}

    def of_this_layout(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Its tensors in a file, by name, as `saved` has them, where another version of PEFT wrote them otherwise."""
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors of a file, by name; their shapes are those of `saved`. Those that are not given stay."""
        state = self.own_state()
        for name, tensor in self.saved(state).items():
            if name in tensors:
                tensor.copy_(tensors[name])


class Shared(_Stored):
    """What all layers of one adapter share, such as VeRA's random matrices; in the file under `base_model.<name>`.

    Buffers that are not persistent are not stored: they are made again from a seed.
    """


class Adapter(_Stored):
    """One adapter on one base layer: parameters, and the equation of its method.

    A method overrides `delta_weight`, which is enough; `forward` where the equation is cheaper than its dense weight;
    `before` where it changes the layer's input, and then sets `rotates`; `merged_weight` and `merged_bias` where the
    merged layer is more than weight + delta. Its code must run under `torch.vmap` (no in-place writes into tensors
    that are not its own, no branches on values), which is how another adapter per row is batched; see `forward_rows`.
    """

    bases: ClassVar[tuple[type[nn.Module], ...]] = LINEARS
    rotates: ClassVar[bool] = False
    weighted: ClassVar[bool] = False  # whether add_weighted_adapter can combine such adapters
    penalises: ClassVar[bool] = False
    scheduled: ClassVar[bool] = False

    @classmethod
    def share(cls, config: Any, bases: Mapping[str, nn.Module]) -> Shared | None:
        """What the layers of a new adapter will share, given all its base layers by path."""
        return None

    @classmethod
    def create(cls, base: nn.Module, config: Any, path: str, shared: Any) -> Self:
        """A new adapter for the base layer at `path`, with its first weights, on the base layer's device.

        On the meta device it only has shapes. Raises AdapterError where the method cannot serve this layer.
        """
        raise NotImplementedError

    def before(self, x: Tensor) -> Tensor:
        """The input that the layer below gets for the input x."""
        return x

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """The adapted output [..., out] for the layer's input x [..., in] and the output y [..., out] so far.

        Without gradients `y` is the adapter's to overwrite: nothing else reads it.
        """
        return y + apply_weight(base, x, self.delta_weight(base))

    def delta_weight(self, base: nn.Module) -> Tensor:
        """What is added to the base layer's weight, in its shape (base.weight_of), in the adapter's precision."""
        raise NotImplementedError

    def merged_weight(self, weight: Tensor, base: nn.Module) -> Tensor:
        """The weight of a plain layer that computes the same. `weight` may hold other adapters; `base` is without."""
        return weight + self.delta_weight(base)

    def merged_bias(self, bias: Tensor | None, base: nn.Module) -> Tensor | None:
        """The bias [out] of that plain layer."""
        return bias

    @classmethod
    def penalty(cls, adapters: Mapping[str, Adapter], config: Any) -> Tensor:
        """What a method that `penalises` adds to the training loss, given all adapters of one name by path."""
        raise NotImplementedError

    @classmethod
    def after_step(cls, adapters: Mapping[str, Adapter], config: Any, step: int) -> None:
        """What a method that is `scheduled` does after optimiser step `step` (from 0), gradients still in place."""
        raise NotImplementedError

    @classmethod
    def stored_config(cls, adapters: Mapping[str, Adapter], config: Any) -> Any:
        """The config for the file, given all adapters of one name by path; training may have changed it."""
        return config

    def file_prefix(self, path: str) -> str:
        """What stands before its tensors' names in a file."""
        return f"{PREFIX}{path}."

    def batch_key(self) -> Hashable:
        """Adapters with the same key are computed in one batch: here, the same shapes and settings."""
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in self.state_dict(keep_vars=True).items())
        settings = (item for item in vars(self).items() if isinstance(item[1], int | float | str | tuple))
        return (type(self), shapes, tuple(settings))

    @classmethod
    def before_rows(cls, adapters: Sequence[Any], group: Group, x: Tensor) -> Tensor:
        """`before` with another adapter per row: for x [B, ...], row b by `adapters[group.which[b]]`."""
        return adapters[0].before(x) if len(adapters) == 1 else stacked(cls.before, adapters, *group.table, x)

    @classmethod
    def forward_rows(cls, adapters: Sequence[Any], group: Group, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """`forward` with another adapter per row: for x and y [B, ...], row b by `adapters[group.which[b]]`."""
        if len(adapters) == 1:
            return adapters[0](x, y, base)
        return stacked(lambda adapter, x, y: adapter(x, y, base), adapters, *group.table, x, y)

    @classmethod
    def add_rows(cls, adapters: Sequence[Any], group: Group, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """`forward_rows` for the group's rows of the whole batch x and y; the others stay as they are."""
        return group.put(y, cls.forward_rows(adapters, group, group.select(x), group.select(y), base))


class Replacement(Adapter):
    """An adapter that is called instead of its base module, with all the module's arguments."""

    @classmethod
    def forward_several(cls, adapters: Sequence[Self], base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The output with all these adapters active."""
        raise NotImplementedError

    @classmethod
    def forward_each(
        cls, adapters: Sequence[Self], group: Group, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """The output for x [B, ...], row b by `adapters[group.which[b]]`, or by the base where that is -1."""
        raise NotImplementedError

    def merged_module(self, module: nn.Module) -> nn.Module:
        """A plain module that computes the same; `module` is the base or holds other adapters already."""
        raise NotImplementedError


class SavedModule(Replacement):
    """A full, trained copy of a module (`modules_to_save`): it is called instead of the base, and saved whole."""

    bases = (nn.Module,)

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def saved(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Under the module's own names, as if it were the base model's."""
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}

    @classmethod
    def forward_several(cls, adapters: Sequence[Self], base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return adapters[-1].module(x, *args, **kwargs)

    @classmethod
    def forward_each(
        cls, adapters: Sequence[Self], group: Group, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Each row goes through its own module once: no weight is copied, and no product is computed in vain."""
        parts, order = [], []
        for number, module in [(-1, base), *((number, adapter.module) for number, adapter in enumerate(adapters))]:
            rows = group.rows_of(number)
            if rows is not None:
                parts.append(module(x[rows], *args, **kwargs))
                order.append(rows)
        return torch.cat(parts)[torch.cat(order).argsort()]

    def merged_module(self, module: nn.Module) -> nn.Module:
        return self.module


class Several(Adapter):
    """Adapters of one name that meet in one layer, such as a low-rank update and a trained bias; a layer unpacks it."""

    def __init__(self, parts: Sequence[Adapter]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)


@dataclasses.dataclass(eq=False)
class ActiveAdapters:
    """What all layers of one model share: which adapters there are, and which are on."""

    configs: dict[str, PeftConfig] = dataclasses.field(default_factory=dict)
    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    requantised: bool = False  # whether merging into quantised layers quantised them again
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

    def __init__(self, base_layer: nn.Module, state: ActiveAdapters, path: str = "") -> None:
        super().__init__()
        quantised.keep_unpacked(base_layer)
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.state = state
        self.path = path
        # The same adapters again, by what a forward pass does with them; a plain dict costs no attribute look-up.
        self._by_name: dict[str, tuple[Any, ...]] = {}
        self._replacing: dict[str, Replacement] = {}
        # The unmerged module, while adapters are merged; in a tuple, so that it is no submodule of ours.
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
        if isinstance(adapter, Replacement):
            self._replacing[name] = adapter
        else:
            self._by_name[name] = _parts(adapter)

    def remove(self, name: str) -> None:
        del self.adapters[name]
        self._by_name.pop(name, None)
        self._replacing.pop(name, None)

    def forward(self, x: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        state = self.state
        if state.rows is not None:
            return self._by_row(x, state.rows, args, kwargs)
        call = self._called()
        # Adapters differ in the layers that they adapt.
        adapters = [part for name in state.applied if name in self._by_name for part in self._by_name[name]]
        if not any(adapter.rotates for adapter in adapters):
            y = call(x, *args, **kwargs)
            for adapter in adapters:
                y = adapter(x, y, self.original)
            return y
        # As if merged one after the other: an adapter sees its input as the later ones have changed it.
        inputs = [x]
        for adapter in reversed(adapters):
            inputs.append(adapter.before(inputs[-1]))
        y = call(inputs.pop(), *args, **kwargs)
        for adapter in adapters:
            y = adapter(inputs.pop(), y, self.original)
        return y

    def _called(self) -> Callable[..., Any]:
        """The base module, or what replaces it."""
        base = self._modules["base_layer"]
        assert base is not None
        if not self._replacing:
            return base
        active = [self._replacing[name] for name in self.state.applied if name in self._replacing]
        if not active:
            return base
        kind = type(active[-1])
        alike = [adapter for adapter in active if type(adapter) is kind]
        return lambda x, *args, **kwargs: kind.forward_several(alike, base, x, *args, **kwargs)

    def _by_row(self, x: Tensor, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Names with adapters that can be computed together, by the place of the adapter among those of its name.
        batches: list[dict[Hashable, list[str]]] = []
        for name in rows.distinct:
            for place, part in enumerate(self._by_name.get(name, ())):
                batches += [{}] if place == len(batches) else []
                batches[place].setdefault(part.batch_key(), []).append(name)
        steps = [
            [
                ([self._by_name[name][place] for name in names], rows.group(names, x, self.path))
                for names in batch.values()
            ]
            for place, batch in enumerate(batches)
        ]
        inputs = [x]
        for step in reversed(steps):
            x = inputs[-1]
            for adapters, group in step:
                if adapters[0].rotates:
                    x = group.put(x, type(adapters[0]).before_rows(adapters, group, group.select(x)))
            inputs.append(x)
        y = self._called_by_row(inputs.pop(), rows, args, kwargs)
        for step in steps:
            x = inputs.pop()
            for adapters, group in step:
                y = type(adapters[0]).add_rows(adapters, group, x, y, self.base_layer)
        return y

    def _called_by_row(self, x: Tensor, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = [name for name in rows.distinct if name in self._replacing]
        if not names:
            return self.base_layer(x, *args, **kwargs)
        adapters = [self._replacing[name] for name in names]
        kind = type(adapters[0])
        if any(type(adapter) is not kind for adapter in adapters):
            message = f"The rows' adapters replace {self.path} by different methods."
            raise AdapterError("Cannot mix these adapters", message, "Give them separate batches.")
        group = rows.group(names, x, self.path, whole=True)
        return kind.forward_each(adapters, group, self.base_layer, x, *args, **kwargs)

    def merge(self, names: Sequence[str], requantise: bool = False) -> quantised.MergeReport | None:
        """Put exactly these adapters into the base weights, in this order.

        The base layer is set aside and comes back with `unmerge` as it was; this costs the memory of one weight. A
        quantised layer gives way to a 16-bit one, or to one of its kind, and a report of the error is returned. Raises
        AdapterError for a weight that would hold inf or nan; the layer then is as it was.
        """
        self.unmerge()
        mine = [part for name in names if name in self.adapters for part in _parts(self.adapters[name])]
        if not mine:
            return None
        replacing = [adapter for adapter in mine if isinstance(adapter, Replacement)]
        whole = any(isinstance(adapter, SavedModule) for adapter in mine)
        if (whole and len(mine) > 1) or 0 < len(replacing) < len(mine):
            message = f"Two adapters meet in {self.path}, and one of them is a whole copy of it (modules_to_save)."
            raise AdapterError("Cannot merge", message, "Merge one of them.")
        base, report = self.base_layer, None
        with torch.no_grad():
            if replacing:
                merged = base
                for adapter in replacing:
                    merged = adapter.merged_module(merged)
            else:
                merged, report = self._merged(mine, requantise)
        self._original = (base,)
        self.base_layer = merged
        return report

    def _merged(self, adapters: list[Any], requantise: bool) -> tuple[nn.Module, quantised.MergeReport | None]:
        base = self.base_layer
        weight = weight_of(base).detach().to(compute_dtype(base))
        bias = None if isinstance(base, nn.Embedding) or base.bias is None else base.bias.detach().to(weight.dtype)
        for adapter in adapters:
            weight = adapter.merged_weight(weight, base)
            bias = adapter.merged_bias(bias, base)
        if not torch.isfinite(weight).all():
            message = f"The merged weight of {self.path} would hold inf or nan."
            raise AdapterError("Cannot merge", message, "Is the adapter trained well?")
        if not quantised.is_quantised(base):
            return with_weight(base, weight, bias), None  # rounded once, after the last adapter
        merged = (quantised.requantised if requantise else quantised.merged_layer)(base, weight, bias)
        return merged, quantised.merge_report(self.path, base, weight, merged)

    def unmerge(self) -> None:
        """Put the base layer back, bit for bit."""
        if not self._original:
            return
        original, now = self._original[0], self.base_layer
        weights = next(original.parameters()), next(now.parameters())
        if weights[0].device != weights[1].device:  # the model was moved meanwhile
            original.to(weights[1].device)
        if weights[0].dtype is not weights[1].dtype and not quantised.is_quantised(original):
            original.to(weights[1].dtype)
        self.base_layer = original
        self._original = ()

    @property
    def original(self) -> nn.Module:
        """The base layer as it is without merged adapters."""
        return self._original[0] if self._original else self.base_layer

    def keep_merged(self) -> None:
        """Make the merged layer the base layer for good."""
        self._original = ()


def _parts(adapter: Any) -> tuple[Any, ...]:
    return tuple(adapter.parts) if isinstance(adapter, Several) else (adapter,)
