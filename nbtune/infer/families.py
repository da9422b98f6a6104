"""What the makers of well-known model families publish about sampling: for models that say nothing themselves.

    family = family_of(model.config)     # Family(name="Qwen3", settings={"temperature": 0.7, ...}, published="...")

A GGUF brings no generation_config.json, and many fine-tunes lose theirs. Values are those of the chat models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """Models of one architecture and maker, and what that maker publishes."""

    name: str
    model_types: tuple[str, ...]  # of config.json
    settings: Mapping[str, float]  # fields of Sampling
    published: str  # where
    vocabulary: int | None = None  # entries; tells apart families of one architecture


FAMILIES = (
    Family(
        "SmolLM2",
        ("llama",),
        {"temperature": 0.2, "top_p": 0.9},
        "the example in the model card of SmolLM2-Instruct",
        vocabulary=49152,
    ),
    Family("SmolLM3", ("smollm3",), {"temperature": 0.6, "top_p": 0.95}, "the model card of SmolLM3-3B"),
    Family(
        "Llama 3",
        ("llama",),
        {"temperature": 0.6, "top_p": 0.9},
        "the generation_config.json of Llama-3.1-8B-Instruct",
        vocabulary=128256,
    ),
    Family(
        "Qwen2.5",
        ("qwen2", "qwen2_moe"),
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
        "the generation_config.json of Qwen2.5-7B-Instruct",
    ),
    Family(
        "Qwen3",
        ("qwen3", "qwen3_moe"),
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0},
        "the model card of Qwen3, without thinking",
    ),
    Family(
        "Mistral Small 3.1 and 3.2",
        ("mistral3",),
        {"temperature": 0.15},
        "the model card of Mistral-Small-3.1-24B-Instruct",
    ),
    # Of its 7B models Mistral publishes nothing.
    Family(
        "Mistral Nemo",
        ("mistral",),
        {"temperature": 0.3},
        "the model card of Mistral-Nemo-Instruct-2407",
        vocabulary=131072,
    ),
    Family(
        "Gemma 3",
        ("gemma3", "gemma3_text", "gemma3n", "gemma3n_text"),
        {"temperature": 1.0, "top_k": 64, "top_p": 0.95},
        "the generation_config.json of gemma-3-4b-it",
    ),
    Family(
        "Phi-3 and Phi-4-mini",
        ("phi3",),
        {"temperature": 0.0},
        "the examples in the model cards of Phi-3 and Phi-4-mini",
    ),
)


def family_of(config: PretrainedConfig) -> Family | None:
    """The family that this model belongs to, told by its architecture and its vocabulary; none where it is in no list.

    config: of the whole model; where none is listed under its own type, that of its part that reads text counts.
    """
    text = config.get_text_config()
    for model_type in (config.model_type, text.model_type):
        for family in FAMILIES:
            if model_type in family.model_types and family.vocabulary in (None, text.vocab_size):
                return family
    return None
