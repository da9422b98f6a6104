"""Prompt tuning's settings."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from typing import Any, ClassVar

from nbtune.peft.config import PromptLearningConfig, invalid, setting


class PromptTuningInit(StrEnum):
    """What the virtual tokens are at first."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class PromptTuningConfig(PromptLearningConfig):
    """Trained input embeddings before the text (Lester et al. 2021, arXiv:2104.08691)."""

    peft_type: ClassVar[str] = "PROMPT_TUNING"

    prompt_tuning_init: str = setting(
        "RANDOM",
        help="First virtual tokens: RANDOM (normal), SAMPLE_VOCAB (embeddings of random tokens) or TEXT (of a text).",
        label="Initialisation",
        choices=("RANDOM", "SAMPLE_VOCAB", "TEXT"),
    )
    prompt_tuning_init_text: str | None = setting(None, help="The text, for TEXT; repeated or cut to the length.")
    tokenizer_name_or_path: str | None = setting(
        None, help="The tokenizer of the text, for TEXT. None: that of the model.", advanced=True
    )
    tokenizer_kwargs: dict[str, Any] | None = setting(
        None, help="Arguments of AutoTokenizer.from_pretrained, for TEXT.", advanced=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        text = self.prompt_tuning_init == PromptTuningInit.TEXT
        if text and not self.prompt_tuning_init_text:
            message = "must be given where prompt_tuning_init is TEXT"
            raise invalid("prompt_tuning_init_text", self.prompt_tuning_init_text, message)
        if self.tokenizer_kwargs and not text:
            raise invalid("tokenizer_kwargs", self.tokenizer_kwargs, "is only for prompt_tuning_init TEXT")
