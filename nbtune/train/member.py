"""A run's own adapter on a base model that other runs' adapters share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nbtune.models.adapter import save_adapter
from nbtune.peft import PeftConfig, PeftModel
from nbtune.peft.layer import Adapter
from nbtune.peft.methods import adapter_class

ALONE = "default"  # the name of an adapter that has a model to itself


class OwnAdapter(PeftModel):
    """A `PeftModel` that knows one of its model's adapters: what is trained, named and saved is that one.

    Names are those of a run alone, so that either can go on from the other's checkpoints.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__(model)
        self.name = name

    @property
    def config(self) -> PeftConfig:
        return self.peft_config[self.name]

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Its parts by the path of their layers."""
        return self._adapters(self.name)

    def _applied(self) -> list[tuple[str, PeftConfig, type[Adapter]]]:
        return [(self.name, self.config, adapter_class(self.config))]

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:  # noqa: ARG002 - none is there twice
        for adapter in self.adapters.values():
            yield from adapter.modules()

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """`model.<path>.adapters.default.<name>`; one that several layers share, once."""
        return self._named(nn.Module.named_parameters)

    def named_buffers(self, *_: Any, **__: Any) -> Iterator[tuple[str, Tensor]]:
        return self._named(nn.Module.named_buffers)

    def _named(self, tensors_of: Any) -> Iterator[tuple[str, Any]]:
        seen: set[Any] = set()
        for path, adapter in self.adapters.items():
            for name, tensor in tensors_of(adapter):
                if tensor not in seen:
                    seen.add(tensor)
                    yield f"model.{path}.adapters.{ALONE}.{name}", tensor

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the adapter into a folder itself, as if it were the model's only one."""
        save_adapter(self, self.name, Path(save_directory), **options)
