"""What a model's config must say after its weights were replaced, or transformers would save or load it wrongly."""

from __future__ import annotations

import warnings

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


def forget_quantisation(base: PreTrainedModel) -> None:
    """Say in the model's config that its weights are plain again, or saving would call them quantised."""
    vars(base.config).pop("quantization_config", None)
    base.is_quantized = False
    base.hf_quantizer = None  # pyright: ignore[reportAttributeAccessIssue] - set by transformers itself
