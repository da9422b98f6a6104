"""Load a base model and its tokenizer for this machine."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nbtune.chat_templates import chat_template
from nbtune.errors import ModelError
from nbtune.models import weights
from nbtune.models.machine import available_memory, compute_dtype, default_device
from nbtune.models.source import OnStatus, Source, fetch, ignore_status, resolve
from nbtune.models.training import prepare_for_training
from nbtune.spec import ModelSpec

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase


# While transformers builds a model, torch's default dtype and the functions that initialise weights are others, in all
# threads: two that build at once get parameters of each other's dtype.
_building = threading.RLock()


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A base model in memory."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Source
    dtype: torch.dtype
    device: torch.device


def load(
    spec: ModelSpec,
    *,
    device: str | torch.device | None = None,
    for_training: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_status: OnStatus = ignore_status,
) -> LoadedModel:
    """Read the weights into memory, in the precision `spec` and the machine call for, quantised where `spec` says so.

    `for_training` turns the key/value cache off and gives the model nbtune's attention over packed rows. `tokenizer` is
    the model's, where it is in memory already.
    Raises ModelError where the model is missing, damaged, too large for the memory or of an unsupported kind.
    """
    import torch

    source = resolve(spec)
    folder = fetch(source, on_status)
    weights.check(folder)
    device = default_device() if device is None else torch.device(device)
    dtype = compute_dtype(spec.dtype, device)
    _check_memory(source, folder, spec, dtype, device)

    on_status(f"Loading {source.name}")
    tokenizer = _read_tokenizer(source, folder, spec) if tokenizer is None else tokenizer
    model = _read_model(source, folder, spec, dtype, device)
    if for_training:
        prepare_for_training(model)
    return LoadedModel(model, tokenizer, source, dtype, device)


def load_tokenizer(spec: ModelSpec, *, on_status: OnStatus = ignore_status) -> PreTrainedTokenizerBase:
    """The model's tokenizer alone. Raises ModelError as `load` does."""
    source = resolve(spec)
    return _read_tokenizer(source, fetch(source, on_status, with_weights=False), spec)


def _read_tokenizer(source: Source, folder: Path, spec: ModelSpec) -> PreTrainedTokenizerBase:
    from nbtune._transformers import AutoTokenizer

    with clear_errors(source):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=spec.trust_remote_code, local_files_only=True
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if spec.chat_template is not None:
        tokenizer.chat_template = chat_template(spec.chat_template)
    return tokenizer


def _read_model(
    source: Source, folder: Path, spec: ModelSpec, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    from nbtune._transformers import AutoModelForCausalLM
    from nbtune.modules.quantised import is_quantised, keep_unpacked

    quantised = spec.quantised_bytes is not None
    with building(source), no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            # A quantised model without a map goes to the first GPU, whatever was asked for.
            device_map={"": device} if quantised or device.type != "cpu" else None,
            quantization_config=_quantisation(spec, dtype) if quantised else None,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=spec.trust_remote_code,
        )
    if quantised:
        for path, module in model.named_modules():
            if spec.load_in_4bit and device.type == "cpu" and is_quantised(module):
                check_rows(source, path, module.in_features)  # pyright: ignore[reportArgumentType] - a linear layer
            keep_unpacked(module)
    # An adapter saved from this model names its base by this; the cache folder would mean nothing elsewhere.
    model.config._name_or_path = source.origin
    model.name_or_path = source.origin
    return model


def check_rows(source: Source, path: str, in_features: int) -> None:
    """On a CPU bitsandbytes 0.50 looks 4-bit scales up by row: wrong ones, even past the end, where blocks are cut."""
    if in_features % 64:
        raise ModelError(
            f"The model {source.name} cannot be loaded in 4 bits on a CPU",
            f"{path} has {in_features} inputs, no multiple of 64, which bitsandbytes computes wrongly on a CPU.",
            "Set load_in_8bit, or load it in 16 bits.",
        )


def _quantisation(spec: ModelSpec, dtype: torch.dtype) -> BitsAndBytesConfig:
    """The output head and the embedding stay as they are, by transformers' own choice."""
    from nbtune._transformers import BitsAndBytesConfig
    from nbtune.modules.quantised import bitsandbytes

    bitsandbytes()
    if spec.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type=spec.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=spec.bnb_4bit_use_double_quant,
    )


def _check_memory(source: Source, folder: Path, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
    needed = weights.memory(folder, dtype.itemsize, spec.quantised_bytes)
    free = available_memory(device)
    if needed > free:
        raise ModelError(
            f"Not enough memory for {source.name}",
            f"Its weights take {needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')};"
            f" {free / 1e9:.1f} GB is free on {device}.",
            "Close other programs and notebooks, or choose a smaller model"
            + (", dtype bfloat16" if dtype.itemsize > 2 else "")
            + (" or load_in_4bit." if not spec.load_in_4bit else "."),
        )


@contextmanager
def building(source: Source) -> Iterator[None]:
    """Around what makes a model: one at a time in a process, and with clear errors."""
    with _building, clear_errors(source):
        yield


@contextmanager
def clear_errors(source: Source) -> Iterator[None]:
    """Turn what transformers raises for a folder it cannot use into a ModelError."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise ModelError(
                f"The model {source.name} brings its own code",
                "Loading it would run Python files that come with the weights.",
                "Read them; if you trust their author, set model.trust_remote_code to true.",
            ) from error
        first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
        raise ModelError(
            f"The model {source.name} cannot be loaded",
            first,
            "It must be a causal language model that this version of transformers knows.",
        ) from error


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Transformers reads and writes weights without progress bars inside."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
