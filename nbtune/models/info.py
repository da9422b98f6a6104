"""What a model looks like inside, from its config alone: the module tree is built without memory for weights."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbtune.models.licence import licence
from nbtune.models.loader import building
from nbtune.models.source import OnStatus, Source, fetch, ignore_status, resolve
from nbtune.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class ModuleInfo:
    """One linear layer."""

    name: str  # "model.layers.3.self_attn.q_proj"
    kind: str  # "q_proj"
    layer: int | None  # 3; None outside the layers
    in_features: int
    out_features: int
    bias: bool


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """A model's architecture and its linear layers, in the order of the forward pass."""

    source: Source
    architecture: str  # "LlamaForCausalLM"
    parameters: int  # shared weights counted once
    hidden_size: int
    layers: int
    vocabulary: int
    context_length: int | None  # tokens; None where the config states no limit
    dtype: str | None  # of the stored weights ("bfloat16"), where the config says
    tied_embeddings: bool
    has_chat_template: bool
    licence: str | None  # as the model's own files state it
    modules: tuple[ModuleInfo, ...]

    def weight_bytes(self, bytes_per_parameter: int, quantised_bytes: float | None = None) -> int:
        """Memory of all weights, where those of linear layers in blocks take `quantised_bytes` each, if given."""
        if quantised_bytes is None:
            return self.parameters * bytes_per_parameter
        linear = sum(module.in_features * module.out_features for module in self.modules if module.layer is not None)
        return int(linear * quantised_bytes) + (self.parameters - linear) * bytes_per_parameter


def describe(spec: ModelSpec, *, on_status: OnStatus = ignore_status) -> ModelInfo:
    """Describe a model without reading its weights (a GGUF is converted first if it never was).

    Raises ModelError as `load` does.
    """
    source = resolve(spec)
    folder = fetch(source, on_status, with_weights=False)
    model = _skeleton(source, folder, spec)
    config = model.config.get_text_config()
    embeddings = model.get_output_embeddings()
    return ModelInfo(
        source=source,
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        vocabulary=config.vocab_size,
        context_length=_context_length(config),
        dtype=str(model.config.dtype).removeprefix("torch.") if model.config.dtype else None,
        tied_embeddings=embeddings is not None and embeddings.weight is model.get_input_embeddings().weight,
        has_chat_template=_has_chat_template(folder),
        licence=_licence(source, folder),
        modules=_linear_modules(model),
    )


def skeleton(spec: ModelSpec, *, on_status: OnStatus = ignore_status) -> PreTrainedModel:
    """The model with its modules and shapes but no weights (torch's meta device). Raises ModelError as `load` does."""
    source = resolve(spec)
    return _skeleton(source, fetch(source, on_status, with_weights=False), spec)


def _skeleton(source: Source, folder: Path, spec: ModelSpec) -> PreTrainedModel:
    import torch

    from nbtune._transformers import AutoConfig, AutoModelForCausalLM

    with building(source):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code, local_files_only=True)
        with torch.device("meta"):
            # In torch's default dtype: another one would be the default of a training thread for that time.
            return AutoModelForCausalLM.from_config(
                config, dtype=torch.get_default_dtype(), trust_remote_code=spec.trust_remote_code
            )


def _linear_modules(model: PreTrainedModel) -> tuple[ModuleInfo, ...]:
    from nbtune.modules.base import LINEARS, features

    found = []
    for name, module in model.named_modules():
        if isinstance(module, LINEARS):
            out_features, in_features = features(module)
            number = re.search(r"\.(\d+)\.", name)
            found.append(
                ModuleInfo(
                    name,
                    kind=name.rpartition(".")[2],
                    layer=int(number[1]) if number else None,
                    in_features=in_features,
                    out_features=out_features,
                    bias=module.bias is not None,
                )
            )
    return tuple(found)


def _licence(source: Source, folder: Path) -> str | None:
    if source.gguf_file is None:
        return licence(folder)
    assert source.path is not None
    return licence(source.path, source.gguf_file)


def _context_length(config: Any) -> int | None:
    try:
        return config.max_position_embeddings  # transformers maps GPT-2's n_positions and the like to this name
    except AttributeError:  # a state-space model has no such limit
        return None


def _has_chat_template(folder: Path) -> bool:
    """Read from the tokenizer's files: loading the tokenizer itself takes about a second."""
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))
