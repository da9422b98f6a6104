"""A LoRA adapter as GGUF, for llama.cpp's `--lora`: A and B of each weight, beside a base in another file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor, nn

from nbtune.errors import ExportError
from nbtune.export.gguf_families import Family
from nbtune.export.gguf_model import Type, add_description, encoded, write_tensors
from nbtune.export.precision import Precision
from nbtune.export.subject import ADAPTER, Subject
from nbtune.peft import AdapterLayer, PeftModel
from nbtune.peft.configs.lora import LoraConfig
from nbtune.peft.layer import Adapter
from nbtune.peft.methods.lora import Lora


def write_gguf_lora(subject: Subject, out: Path, precision: Precision) -> None:
    """Write the adapter. llama.cpp scales B A by alpha / r with one alpha; B takes in what differs from that.

    Raises ExportError where the adapter is more than A and B of linear layers.
    """
    config, adapters = _checked(subject)
    family = Family(subject.model.config)
    tensors: dict[str, tuple[str, Tensor]] = {}
    for path, adapter in adapters.items():
        parameter = f"{path}.weight"
        name = family.name(parameter)
        scale = adapter.scaling * len(adapter.lora_A) / config.lora_alpha
        tensors[f"{name}.lora_a"] = parameter, adapter.lora_A.detach()
        tensors[f"{name}.lora_b"] = parameter, family.stored(parameter, scale * adapter.lora_B.detach())
    kind = Type[precision.name.upper()]
    writer = gguf.GGUFWriter(None, family.architecture)
    add_description(writer, subject, gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config.lora_alpha))
    shapes = {name: (tensor.shape, kind) for name, (_, tensor) in tensors.items()}
    write_tensors(writer, out, shapes, lambda name: encoded(*tensors[name], kind))


@torch.no_grad()
def read_gguf_lora(subject: Subject, path: Path) -> Any:
    """The base model with the written adapter in its weights, as llama.cpp would compute it."""
    assert isinstance(subject.model, PeftModel)
    model: Any = subject.model.unload()
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    family = Family(model.config)
    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    read = {tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}
    for parameter, weight in parameters.items():
        name = family.name(parameter)
        if f"{name}.lora_a" in read:
            down, up = read[f"{name}.lora_a"], family.own(parameter, read[f"{name}.lora_b"])
            weight += (alpha / len(down) * up @ down).to(weight.dtype)
    return model


def _checked(subject: Subject) -> tuple[LoraConfig, dict[str, Lora]]:
    """The adapter's config and its A and B by the path of their layer."""
    if not isinstance(subject.model, PeftModel):
        raise _unfit("Every weight was trained; there is no adapter.")
    config = subject.model.peft_config[ADAPTER]
    if type(config) is not LoraConfig:
        raise _unfit(f"It is {subject.trained.label}.")
    found: dict[str, Lora] = {}
    for path, layer in subject.model.get_base_model().named_modules():
        if isinstance(layer, AdapterLayer) and ADAPTER in layer.adapters:
            adapter = layer.adapters[ADAPTER]
            assert isinstance(adapter, Adapter)
            if type(adapter) is not Lora or not adapter.plain or not isinstance(layer.base_layer, nn.Linear):
                raise _unfit(f"{path} has more than A and B of a linear layer: {_more(config)}.")
            found[path] = adapter
    if config.modules_to_save:
        raise _unfit(f"It has trained copies of whole modules: {', '.join(config.modules_to_save)}.")
    base: Any = subject.model.get_base_model()
    head = base.get_output_embeddings()
    if head.weight is base.get_input_embeddings().weight and any(path == "lm_head" for path in found):
        raise _unfit("It adapts an output head that is tied to the embedding.")
    return config, found


def _more(config: LoraConfig) -> str:
    """What makes it more, as far as the config tells."""
    parts = {
        "DoRA": config.use_dora,
        "a trained bias": config.lora_bias or config.bias != "none",
        f"init {config.init_lora_weights}": isinstance(config.init_lora_weights, str),
        "trained tokens": config.trainable_token_indices,
        "whole parameters": config.target_parameters,
    }
    return ", ".join(name for name, is_so in parts.items() if is_so) or "another kind of layer"


def _unfit(why: str) -> ExportError:
    return ExportError("This cannot be a GGUF LoRA adapter", why, "Export it as gguf: the merged model.")
