"""Trainable tokens' settings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nbtune.peft.config import LayerConfig, invalid, setting


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class TrainableTokensConfig(LayerConfig):
    """Trained embeddings of some tokens. Names and defaults are those of peft 0.21."""

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    absent: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")

    token_indices: list[int] = setting(factory=list, help="The tokens' ids.", label="Tokens")
    init_weights: bool = setting(
        True, help="Start at the model's embeddings. False: start random.", label="Initialisation", advanced=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modules_to_save:
            raise invalid("modules_to_save", self.modules_to_save, "is no setting of TRAINABLE_TOKENS; LORA has both")
        check_tokens("token_indices", self.token_indices)  # again when their rows are read, for LoRA's


def check_tokens(name: str, tokens: list[int]) -> None:
    """Raise AdapterError for ids that cannot be rows of an embedding."""
    if len(set(tokens)) < len(tokens) or any(token < 0 for token in tokens):
        raise invalid(name, tokens, "must be different ids, counted from 0")
