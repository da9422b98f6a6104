"""P-tuning's settings."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from typing import ClassVar

from nbtune.peft.config import PromptLearningConfig, setting


class PromptEncoderReparameterizationType(StrEnum):
    """The network that makes the virtual tokens."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class PromptEncoderConfig(PromptLearningConfig):
    """Input embeddings made by a trained network, before the text (Liu et al. 2021, arXiv:2103.10385)."""

    peft_type: ClassVar[str] = "P_TUNING"

    encoder_reparameterization_type: str = setting(
        "MLP",
        help="The network: MLP (three linear layers) or LSTM (bidirectional, as in the paper). It is not saved: only "
        "the virtual tokens that it makes are.",
        label="Prompt encoder",
        choices=("MLP", "LSTM"),
    )
    encoder_hidden_size: int | None = setting(
        None, help="Width of the network. None: that of the embeddings.", ge=1, sweepable=True
    )
    encoder_num_layers: int = setting(2, help="Layers of the LSTM; the MLP always has three.", ge=1, advanced=True)
    encoder_dropout: float = setting(
        0.0, help="Share dropped between the layers of the LSTM in training.", ge=0, lt=1, advanced=True
    )
