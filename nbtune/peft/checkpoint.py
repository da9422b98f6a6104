"""An adapter's files, as PEFT reads and writes them: adapter_config.json and adapter_model.safetensors.

Keys are `base_model.model.<module path>.<parameter>`, such as
`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`; the adapter's name is not in the file. Loading is
strict, and writing twice gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nbtune import _files
from nbtune.errors import AdapterError
from nbtune.peft.config import CONFIG_NAME, WEIGHTS_NAME, PeftConfig
from nbtune.peft.layer import PREFIX, Adapter, Several, Shared

_SHOWN = 8  # keys listed in an error


class LoadResult(NamedTuple):
    """What a load that is not strict left out."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class _Part(NamedTuple):
    """Something with tensors of its own in the file."""

    prefix: str  # of its keys in the file
    inside: str  # of its names in the model's state dict
    module: Adapter | Shared


def _parts(adapters: Mapping[str, Adapter], name: str = "") -> Iterator[_Part]:
    """What goes into the file: the layers' adapters, and what they share."""
    shared: dict[Shared, str] = {}
    for path, adapter in adapters.items():
        inside = f"{PREFIX}{path}.adapters.{name}."
        parts: Any = enumerate(adapter.parts) if isinstance(adapter, Several) else [(None, adapter)]
        for number, part in parts:
            within = inside if number is None else f"{inside}parts.{number}."
            yield _Part(part.file_prefix(path), within, part)
            for child_name, child in part.named_children():
                if isinstance(child, Shared):
                    shared[child] = f"{within}{child_name}."
    for module, within in shared.items():
        yield _Part("base_model.", within, module)


def adapter_tensors(
    adapters: Mapping[str, Adapter], name: str = "", state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of one adapter, by module path, under their keys in the file.

    They are taken from a full state dict of the PeftModel, if one is given, where they go by `...adapters.<name>.`.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, inside, part in _parts(adapters, name):
        state = part.own_state()
        if state_dict is not None:
            state = {own: state_dict[inside + own] for own in state}
        tensors |= {prefix + key: tensor for key, tensor in part.saved(state).items()}
    return tensors


def fill(
    model: nn.Module, adapters: Mapping[str, Adapter], tensors: Mapping[str, Tensor], strict: bool = True
) -> LoadResult:
    """Copy tensors, by their keys in the file, into the adapters of a base model.

    PEFT adds weights of the base where it believes that embeddings have changed; they are passed over if they are equal
    to the model's. Raises AdapterError where a tensor has another shape and, if strict, where one is missing or has no
    place; nothing is copied then.
    """
    parts = list(_parts(adapters))
    places = adapter_tensors(adapters)
    tensors = dict(tensors)
    for prefix, _, part in parts:
        own = [name for name in part.saved(part.own_state()) if prefix + name in tensors]
        now = part.of_this_layout({name: tensors[prefix + name] for name in own})
        tensors |= {prefix + name: tensor for name, tensor in now.items()}
    missing = sorted(places.keys() - tensors.keys())
    repeated = {prefix + name for prefix, _, part in parts for name in part.repeated}
    unexpected = sorted(tensors.keys() - places.keys() - repeated)
    base: dict[str, Tensor] = {}
    if unexpected:
        base = {f"{PREFIX}{name.replace('.base_layer.', '.')}": value for name, value in model.named_parameters()}
        unexpected = [key for key in unexpected if not _same_base(key, tensors[key], base)]
    common = sorted(places.keys() & tensors.keys())
    wrong = [
        f"{key}: {list(tensors[key].shape)} in the file, {list(places[key].shape)} in the model"
        for key in common
        if tensors[key].shape != places[key].shape
    ]
    problems = [_listed("Wrong shape", wrong)]
    if strict:
        foreign = [key for key in unexpected if key.replace(".base_layer.", ".") in base]
        unknown = [key for key in unexpected if key not in foreign]
        problems += [_listed("Missing", missing), _listed("Unexpected", unknown)]
        problems += [_listed("A weight of the base model, and not the same as in this one", foreign)]
    if any(problems):
        remedy = "Is it the same base model?" + (" strict=False loads what fits." if strict and not wrong else "")
        raise AdapterError("The adapter does not fit the model", "\n".join(filter(None, problems)), remedy)
    with torch.no_grad():
        for prefix, _, part in parts:
            names = [name for name in part.saved(part.own_state()) if prefix + name in tensors]
            part.load({name: tensors[prefix + name] for name in names})
    return LoadResult(missing, unexpected)


def _same_base(key: str, tensor: Tensor, base: Mapping[str, Tensor]) -> bool:
    """Whether a tensor of the file is one of the base model's weights, unchanged in the lower of their precisions."""
    weight = base.get(key.replace(".base_layer.", "."))
    if weight is None or weight.shape != tensor.shape:
        return False
    lower = min(weight.dtype, tensor.dtype, key=lambda dtype: torch.finfo(dtype).bits)
    return torch.equal(weight.detach().cpu().to(lower), tensor.cpu().to(lower))


def _listed(what: str, entries: list[str]) -> str:
    if not entries:
        return ""
    more = f"\n  and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return f"{what} ({len(entries)}):\n  " + "\n  ".join(entries[:_SHOWN]) + more


def write(folder: Path, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write both files into a folder, each whole or not at all, replacing what is there."""
    ready = {key: tensors[key].detach().cpu().contiguous().clone() for key in sorted(tensors)}
    # A config without weights is no adapter, so it comes last.
    _files.write_bytes(folder / WEIGHTS_NAME, safetensors.torch.save(ready, metadata={"format": "pt"}))
    _files.write_text(folder / CONFIG_NAME, config.to_json())


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors in an adapter's folder. Raises AdapterError where they are absent, cut off or a pickle."""
    path, pickle = folder / WEIGHTS_NAME, folder / "adapter_model.bin"
    if not path.is_file() and pickle.is_file():
        convert = (
            "safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), '" + WEIGHTS_NAME + "')"
        )
        message = f"{pickle} is a pickle, which can run any code when it is read."
        raise AdapterError("The weights are a pickle", message, f"If you trust it, convert it once: {convert}")
    if not path.is_file():
        raise AdapterError("No weights", f"{folder} has no {WEIGHTS_NAME}.", "Save the adapter again.")
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError("Unreadable weights", f"{path}: {error}", "Copy or save the adapter again.") from error
