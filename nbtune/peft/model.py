"""PeftModel: a base model with adapters, under PEFT's names.

    model = get_peft_model(base, LoraConfig(r=16))     # train it, then
    model.save_pretrained("adapter")
    model = PeftModel.from_pretrained(base, "adapter")
    model.load_adapter("other", "b"); model.set_adapter("b")
    with model.disable_adapter(): ...                  # the base model

The base model's layers are replaced in place, and every fact about the adapters is kept in one object that those
layers share. A `PeftModel` is only a view of it: two views of one base always agree, so that the cells of a notebook
can be run again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from nbtune import _files
from nbtune._transformers import PreTrainedModel
from nbtune.errors import AdapterError
from nbtune.modules.checkpointing import recomputed_within
from nbtune.modules.pretrained import forget_quantisation, untie_head
from nbtune.modules.quantised import MergeReport
from nbtune.peft import checkpoint, combination, inject, prompt
from nbtune.peft.config import LayerConfig, PeftConfig, PromptLearningConfig, TaskType, adapter_folder, did_you_mean
from nbtune.peft.layer import BASE, ActiveAdapters, Adapter, AdapterLayer, Rows
from nbtune.peft.methods import adapter_class
from nbtune.peft.targets import find_targets, resolve


def get_peft_model(model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default") -> PeftModel:
    """The model with a new adapter, which is the only active one; `model` is changed in place.

    Running this twice gives the same as running it once: an adapter of that name, on the base model or on a PeftModel,
    is replaced by a new one. Adapters of other names stay, unmerged and switched off. Raises AdapterError where the
    config does not fit the model, which then has the adapters that it had.
    """
    adapted = model if isinstance(model, PeftModel) else _class_for(PeftModel, peft_config)(model)
    adapted.unmerge_adapter()
    adapted._add(adapter_name, peft_config, replace=True)
    adapted.set_adapter(adapter_name)
    return adapted


def _class_for(kind: type[PeftModel], config: PeftConfig) -> type[PeftModel]:
    """The class of the config's task, in the place of PeftModel itself."""
    from nbtune.peft.tasks import MODELS  # which are PeftModels, so their module imports this one

    return MODELS[TaskType(config.task_type)] if kind is PeftModel and config.task_type else kind


def inject_adapter_in_model(peft_config: PeftConfig, model: nn.Module, adapter_name: str = "default") -> nn.Module:
    """The model itself, with a new adapter in its layers and no PeftModel around it; see `get_peft_model`."""
    return get_peft_model(model, peft_config, adapter_name).get_base_model()


class _Base(nn.Module):
    """Holds the base model as `.model`, so that paths read `base_model.model.<path>` as they do in PEFT."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def update_and_allocate(self, global_step: int) -> None:
        """PeftModel's, where AdaLoRA's users of PEFT call it."""
        PeftModel(self.model).update_and_allocate(global_step)


class PeftModel(nn.Module):
    """A base model with adapters. Attributes that it does not have itself are those of the base model."""

    base_model: _Base

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = _Base(model)
        self._state = next((layer.state for _, layer in inject.adapter_layers(model)), None) or ActiveAdapters()
        self.training = model.training

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        if "base_model" not in modules or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(modules["base_model"].model, name)

    def get_base_model(self) -> nn.Module:
        """The model that was adapted, with its adapters in place."""
        return self.base_model.model

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The config of every adapter by its name."""
        return self._state.configs

    @property
    def active_adapters(self) -> list[str]:
        return list(self._state.active)

    @property
    def active_adapter(self) -> str | None:
        """The first active adapter."""
        return self._state.active[0] if self._state.active else None

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters require gradients, and how many there are, adapters included."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")  # noqa: T201

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig) -> None:
        """Add a new adapter, switched off unless it is the first. Raises AdapterError where the name is taken."""
        self._add(adapter_name, peft_config, replace=False)

    def _add(
        self,
        name: str,
        config: PeftConfig,
        *,
        replace: bool,
        tensors: Mapping[str, Tensor] | None = None,
        strict: bool = True,
    ) -> checkpoint.LoadResult:
        """Build, fill and attach an adapter; whatever fails leaves the model as it was."""
        inject.check_name(name)
        if name in self.peft_config and not replace:
            raise AdapterError("The name is taken", f"There is an adapter {name!r} already.", "Use another name.")
        self._refuse_merged(self._state.merged)  # a copy of a base module would hold them too
        if not isinstance(config, LayerConfig | PromptLearningConfig):
            message = f"The config is a {type(config).__name__}."
            raise AdapterError("Not a config", message, "Give one such as LoraConfig(r=8).")
        base = self.get_base_model()
        if isinstance(config, LayerConfig):
            if tensors is None:  # a name without a module is a slip of the pen in a new config, a fact in a file
                find_targets(base, config)
            config = resolve(base, config)
        else:
            config = prompt.resolve(base, config)
        if config.base_model_name_or_path is None and isinstance(base, PreTrainedModel):
            config = config.replace(base_model_name_or_path=base.name_or_path or None)
        adapters = inject.build(base, config, to_fill=tensors is not None)
        result = checkpoint.LoadResult([], [])
        if tensors is not None:
            result = checkpoint.fill(base, adapters, tensors, strict)

        was_active = self._state.active
        if name in self.peft_config:
            self._remove(name)
        if not self.peft_config:
            self._freeze_base()
        inject.attach(base, self._state, name, adapters)
        self.peft_config[name] = config
        self._state.update(active=was_active or (name,))
        return result

    def _freeze_base(self) -> None:
        self._state.frozen = [parameter for parameter in self.get_base_model().parameters() if parameter.requires_grad]
        for parameter in self._state.frozen:
            parameter.requires_grad_(False)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Switch to one adapter or to several at once (their updates add up), in the time of an assignment.

        Whether an adapter's parameters require gradients does not change: those that are switched off get none, as they
        take no part in the forward pass. See `set_requires_grad`.
        """
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(dict.fromkeys(adapter_name))
        self._check_known(names)
        self._refuse_merged([name for name in self._state.merged if name not in names])
        self._state.update(active=names)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or thaw adapters."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_known(names)
        for name in names:
            for adapter in self._adapters(name).values():
                adapter.requires_grad_(requires_grad)
            self.peft_config[name] = self.peft_config[name].replace(inference_mode=not requires_grad)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model, inside the block. Merged adapters are taken out for as long and put back exactly."""
        enabled, merged = self._state.enabled, self._state.merged
        if merged:
            self.unmerge_adapter()
        self._state.update(enabled=False)
        try:
            yield
        finally:
            self._state.update(enabled=enabled)
            if merged:
                self._merge(merged, self._state.requantised)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. Where it was the only active one, the first of the others becomes active."""
        self._check_known([adapter_name])
        self._refuse_merged([adapter_name])
        self._remove(adapter_name)
        if not self._state.active and self.peft_config:
            first = next(iter(self.peft_config))
            self._state.update(active=(first,))
            warnings.warn(f"The active adapter {adapter_name!r} is deleted; {first!r} is active now.", stacklevel=2)

    def _remove(self, name: str) -> None:
        inject.detach(self.get_base_model(), name)
        del self.peft_config[name]
        self._state.update(active=tuple(other for other in self._state.active if other != name))

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        **settings: Any,
    ) -> None:
        """Add an adapter that is a weighted combination of others of one method, LoRA or IA3, switched off.

        The combination types and their settings (svd_driver, density, majority_sign_method) are those of
        kernels/low_rank.py; IA3 only has `linear`. `svd_full_matrices` is PEFT's and changes nothing. Raises
        AdapterError, and adds nothing, where the adapters cannot be combined so.
        """
        inject.check_name(adapter_name)
        self._check_known(adapters)
        if adapter_name in self.peft_config:
            raise AdapterError("The name is taken", f"There is an adapter {adapter_name!r}.", "Use another name.")
        settings |= {"svd_rank": svd_rank, "svd_clamp": svd_clamp}
        parts = {name: (self.peft_config[name], self._adapters(name)) for name in adapters}
        base = self.get_base_model()
        config, combined = combination.combined(base, parts, weights, combination_type, **settings)
        inject.attach(base, self._state, adapter_name, combined)
        self.peft_config[adapter_name] = config

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = True, *, requantise: bool = False
    ) -> list[MergeReport]:
        """Put adapters (the active ones) into the base weights, so that they cost no time.

        Until `unmerge_adapter`, which restores the base bit for bit, each adapted weight is held twice. A weight that
        would hold inf or nan is always refused; `safe_merge` is PEFT's. A layer in 4 or 8 bits gives way to a 16-bit
        one, or with `requantise` to one of its kind; the reports say how far each is from the exact sum.
        """
        names = self._state.active if adapter_names is None else tuple(adapter_names)
        self._check_known(names)
        return self._merge(tuple(dict.fromkeys([*self._state.merged, *names])), requantise)

    def _merge(self, names: tuple[str, ...], requantise: bool = False) -> list[MergeReport]:
        layers = [layer for _, layer in inject.adapter_layers(self.get_base_model())]
        try:
            reports = [layer.merge(names, requantise) for layer in layers]
        except AdapterError:
            self.unmerge_adapter()
            raise
        _tie_again(layers)
        self._state.requantised = requantise
        self._state.update(merged=names)
        return [report for report in reports if report is not None]

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the base weights, exactly."""
        for _, layer in inject.adapter_layers(self.get_base_model()):
            layer.unmerge()
        self._state.update(merged=())

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: Sequence[str] | None = None,
        *,
        requantise: bool = False,
    ) -> nn.Module:
        """The base model with adapters (the active ones) in its weights for good, and no adapter layers.

        Warns with the largest error where quantised layers were merged into; see `merge_adapter`.
        """
        reports = self.merge_adapter(adapter_names, safe_merge, requantise=requantise)
        if reports:
            worst = max(reports, key=lambda report: report.relative_error)
            held = f"as {worst.kind}" if requantise else "in 16 bits"
            message = f"{len(reports)} quantised layers were merged and are held {held}; the largest relative error is "
            warnings.warn(f"{message}{worst.relative_error:.2g}, in {worst.path}.", stacklevel=2)
        base = self.get_base_model()
        for _, layer in inject.adapter_layers(base):
            layer.keep_merged()
        self._take_all_out()
        if isinstance(base, PreTrainedModel):
            untie_head(base)
            if reports and not requantise:
                forget_quantisation(base)
        return base

    def unload(self) -> nn.Module:
        """The base model as it was before the first adapter."""
        self.unmerge_adapter()
        self._take_all_out()
        return self.get_base_model()

    def _take_all_out(self) -> None:
        self._state.update(merged=())
        for name in list(self.peft_config):
            self._remove(name)
        for parameter in self._state.frozen:
            parameter.requires_grad_(True)
        self._state.frozen = []

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        revision: str | None = None,
        strict: bool = True,
    ) -> Self:
        """The model with the adapter of a folder or hub repository, active; `model` is changed in place.

        The adapter is FROZEN unless `is_trainable`: it serves, in eval mode, and training it would change nothing;
        `train()` then warns. Raises AdapterError where the files do not fit the model exactly; `strict=False` loads
        what fits.
        """
        folder = adapter_folder(model_id, revision)
        kind: Any = _class_for(cls, PeftConfig.from_pretrained(folder))
        adapted = kind(model.get_base_model() if isinstance(model, PeftModel) else model)
        adapted.load_adapter(folder, adapter_name, is_trainable, strict=strict)
        adapted.set_adapter(adapter_name)
        return adapted.eval() if not is_trainable else adapted

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        *,
        revision: str | None = None,
        strict: bool = True,
    ) -> checkpoint.LoadResult:
        """Add the adapter of a folder or hub repository, frozen unless `is_trainable`, in place of one of that name.

        It stays switched off unless it is the first. Raises AdapterError, and leaves the model as it was, where the
        files do not fit the model exactly; `strict=False` loads what fits.
        """
        folder = adapter_folder(model_id, revision)
        config = PeftConfig.from_pretrained(folder).replace(inference_mode=not is_trainable)
        return self._add(adapter_name, config, replace=True, tensors=checkpoint.read(folder), strict=strict)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        selected_adapters: Sequence[str] | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        safe_serialization: bool = True,
        is_main_process: bool = True,
    ) -> None:
        """Write the adapters: `default` into the folder itself, each other into a folder of its name inside.

        A new folder appears complete or not at all; in one that is there, each file is replaced as a whole.
        """
        names = list(self.peft_config if selected_adapters is None else selected_adapters)
        self._check_known(names)
        if not names:
            raise AdapterError("Nothing to save", "The model has no adapter.", "Add one with add_adapter.")
        if not safe_serialization:
            raise AdapterError("No pickles", "safe_serialization is False; nbtune writes safetensors only.")
        folder = Path(save_directory)
        if folder.exists() and not folder.is_dir():
            raise AdapterError("Not a folder", f"{folder} is a file.", "Give a folder to save into.")
        tensors = {name: get_peft_model_state_dict(self, state_dict, name) for name in names}
        if not is_main_process:
            return
        if folder.exists():
            self._write(folder, tensors)
        else:
            with _files.atomic_folder(folder) as temporary:
                self._write(temporary, tensors)

    def _write(self, folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        base = type(self.get_base_model())
        for name, values in tensors.items():
            config = self.peft_config[name].replace(inference_mode=True)
            config = adapter_class(config).stored_config(self._adapters(name), config)
            if config.task_type is None:  # what PEFT's AutoPeftModel goes by
                mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
                config = config.replace(auto_mapping=mapping)
            checkpoint.write(folder if name == "default" else folder / name, config, values)

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's forward. `adapter_names` gives each row of the batch its adapter, `__base__` for none.

        The loss of the output, if it has one, includes what the method adds to it (`penalty`).
        """
        with self._rows(adapter_names), prompt.prompted(self.get_base_model(), self._state):
            output = self.base_model(*args, **kwargs)
        penalty = self.penalty()
        if penalty is not None and isinstance(output, dict) and output.get("loss") is not None:
            output["loss"] = output["loss"] + penalty  # transformers' outputs are dicts
        return output

    def penalty(self) -> Tensor | None:
        """What the active adapters' methods add to the training loss: AdaLoRA's orthogonality; else None."""
        penalties = [
            kind.penalty(self._adapters(name), config) for name, config, kind in self._applied() if kind.penalises
        ]
        return torch.stack(penalties).sum() if penalties else None

    def update_and_allocate(self, global_step: int) -> None:
        """What a method does after an optimiser step (AdaLoRA: move its rank budget), gradients still in place.

        Steps count from 0. Call it before `optimizer.zero_grad()`, with any method: most do nothing.
        """
        for name, config, kind in self._applied():
            if kind.scheduled:
                kind.after_step(self._adapters(name), config, global_step)

    def _applied(self) -> list[tuple[str, PeftConfig, type[Adapter]]]:
        configs = [(name, self.peft_config[name]) for name in self._state.applied]
        return [(name, config, adapter_class(config)) for name, config in configs]

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's generate; `adapter_names` as in `forward`."""
        base: Any = self.get_base_model()
        with self._rows(adapter_names), prompt.prompted(base, self._state):
            return base.generate(*args, **kwargs)

    @contextmanager
    def _rows(self, names: Sequence[str] | None) -> Iterator[None]:
        if names is None:
            yield
            return
        if isinstance(names, str) or not names:
            message = f"adapter_names is {names!r}."
            raise AdapterError("Not a list of names", message, "Give a list with one name per row.")
        self._check_known([name for name in names if name != BASE])
        self._refuse_merged(self._state.merged)
        state, rows = self._state, Rows(names)

        @contextmanager
        def with_rows() -> Iterator[None]:
            before, state.rows = state.rows, rows
            try:
                yield
            finally:
                state.rows = before

        # Gradient checkpointing runs blocks again in the backward pass, when these rows are over.
        recomputes = self.training and torch.is_grad_enabled()
        with with_rows(), recomputed_within(self.get_base_model(), with_rows) if recomputes else nullcontext():
            yield

    def train(self, mode: bool = True) -> Self:
        """Set training or eval mode. Warns where the active adapters are frozen, so that training would do nothing."""
        super().train(mode)
        active = self._state.active
        if mode and active and all(self.peft_config[name].inference_mode for name in active):
            message = f"The active adapter {', '.join(active)} is frozen: training it changes nothing. "
            warnings.warn(f"{message}Load it with is_trainable=True, or thaw it: set_requires_grad.", stacklevel=2)
        return self

    def _adapters(self, name: str) -> dict[str, Adapter]:
        """The parts of one adapter by module path."""
        layers = inject.adapter_layers(self.get_base_model())
        return {path: layer.adapters[name] for path, layer in layers if name in layer.adapters}  # type: ignore[misc]

    def _check_known(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.peft_config:
                there = ", ".join(self.peft_config) or "none"
                message = f"There is no adapter {name!r}; there are: {there}."
                raise AdapterError("No such adapter", message, did_you_mean(str(name), list(self.peft_config)))

    def _refuse_merged(self, names: Sequence[str]) -> None:
        merged = [name for name in names if name in self._state.merged]
        if merged:
            message = f"{', '.join(merged)}: these weights are part of the base weights now."
            raise AdapterError("The adapter is merged", message, "Call unmerge_adapter first.")


def get_peft_model_state_dict(
    model: PeftModel, state_dict: Mapping[str, Tensor] | None = None, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """The tensors of one adapter under PEFT's keys, sorted.

    `state_dict` is a full state dict of the model to take them from, as FSDP or DeepSpeed gathers it.
    """
    model._check_known([adapter_name])
    tensors = checkpoint.adapter_tensors(model._adapters(adapter_name), adapter_name, state_dict)
    return dict(sorted(tensors.items()))


def set_peft_model_state_dict(
    model: PeftModel, state_dict: Mapping[str, Tensor], adapter_name: str = "default", *, strict: bool = True
) -> checkpoint.LoadResult:
    """Copy tensors under PEFT's keys into one adapter.

    Raises AdapterError, and changes nothing, where shapes differ or, if `strict`, keys are missing or unexpected.
    """
    model._check_known([adapter_name])
    model._refuse_merged([adapter_name])
    return checkpoint.fill(model.get_base_model(), model._adapters(adapter_name), state_dict, strict)


def _tie_again(layers: Sequence[AdapterLayer]) -> None:
    """Layers that had one weight, and have equal ones after merging, share one again: trained tokens of a tied head."""
    first: dict[Tensor, Any] = {}
    for layer in layers:
        weight = layer.original._parameters.get("weight")
        if weight is None or layer.original is layer.base_layer:
            continue
        twin = first.setdefault(weight, layer.base_layer)
        if twin is not layer.base_layer and torch.equal(layer.base_layer.weight, twin.weight):
            layer.base_layer.weight = twin.weight
