"""A model's files, and what its config must say of weights that were replaced, or it would be saved wrongly."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import torch

from nbtune._transformers import PreTrainedModel


def untie_head(base: PreTrainedModel) -> None:
    """Say in the model's config that a merged head is no longer its embedding, or saving would drop it."""
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    tied = base.config.get_text_config().tie_word_embeddings
    if tied and head is not None and torch.is_tensor(head.weight) and head.weight is not embedding.weight:
        base.config.get_text_config().tie_word_embeddings = False
        base.config.tie_word_embeddings = False
        warnings.warn("The output head was merged and is no longer tied to the embedding.", stacklevel=3)


def forget_quantisation(base: Any) -> None:
    """Say in the model's config that its weights are plain again, or saving would call them quantised."""
    vars(base.config).pop("quantization_config", None)
    base.is_quantized = False
    base.hf_quantizer = None


def open_weights(folder: Path, files: contextlib.ExitStack) -> dict[str, Any]:
    """The open safetensors file that holds each tensor of a model's folder."""
    from safetensors import safe_open

    opened = [files.enter_context(safe_open(path, framework="pt")) for path in sorted(folder.glob("*.safetensors"))]
    return {key: file for file in opened for key in file.keys()}  # noqa: SIM118 - no dict
