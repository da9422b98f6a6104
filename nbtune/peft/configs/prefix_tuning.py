"""Prefix tuning's settings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nbtune.peft.config import PromptLearningConfig, setting


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class PrefixTuningConfig(PromptLearningConfig):
    """Trained keys and values before the text, in every layer (Li & Liang 2021, arXiv:2101.00190)."""

    peft_type: ClassVar[str] = "PREFIX_TUNING"

    prefix_projection: bool = setting(
        False,
        help="Train a small network that makes the keys and values, which is more stable; only they are saved.",
        label="Projection",
    )
    encoder_hidden_size: int | None = setting(
        None, help="Width of that network. None: that of the keys.", ge=1, advanced=True
    )
    init_weights: str | None = setting(
        None, help="First keys and values: None (normal) or zero.", choices=(None, "zero"), advanced=True
    )
