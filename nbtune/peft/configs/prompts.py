"""Settings of the methods that train a prompt."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from nbtune.peft.config import PromptLearningConfig, invalid
from nbtune.peft.fields import detail, setting


class PromptTuningInit(StrEnum):
    """What the virtual tokens are at first."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class PromptEncoderReparameterizationType(StrEnum):
    """The network that makes the virtual tokens."""

    MLP = "MLP"
    LSTM = "LSTM"


class PromptTuningConfig(PromptLearningConfig, peft_type="PROMPT_TUNING"):
    """Trained input embeddings before the text (Lester et al. 2021, arXiv:2104.08691)."""

    prompt_tuning_init: str = setting(
        "RANDOM",
        "First virtual tokens: RANDOM (normal), SAMPLE_VOCAB (embeddings of random tokens) or TEXT (of a text).",
        label="Initialisation",
        choices=("RANDOM", "SAMPLE_VOCAB", "TEXT"),
    )
    prompt_tuning_init_text: str | None = setting(None, "The text, for TEXT; repeated or cut to the length.")
    tokenizer_name_or_path: str | None = detail(None, "The tokenizer of the text, for TEXT. None: that of the model.")
    tokenizer_kwargs: dict[str, Any] | None = detail(None, "Arguments of AutoTokenizer.from_pretrained, for TEXT.")

    def __post_init__(self) -> None:
        super().__post_init__()
        text = self.prompt_tuning_init == PromptTuningInit.TEXT
        if text and not self.prompt_tuning_init_text:
            message = "must be given where prompt_tuning_init is TEXT"
            raise invalid("prompt_tuning_init_text", self.prompt_tuning_init_text, message)
        if self.tokenizer_kwargs and not text:
            raise invalid("tokenizer_kwargs", self.tokenizer_kwargs, "is only for prompt_tuning_init TEXT")


class PrefixTuningConfig(PromptLearningConfig, peft_type="PREFIX_TUNING"):
    """Trained keys and values before the text, in every layer (Li & Liang 2021, arXiv:2101.00190)."""

    prefix_projection: bool = setting(
        False,
        "Train a small network that makes the keys and values, which is more stable; only they are saved.",
        label="Projection",
    )
    encoder_hidden_size: int | None = detail(None, "Width of that network. None: that of the keys.", ge=1)
    init_weights: str | None = detail(None, "First keys and values: None (normal) or zero.", choices=(None, "zero"))


class PromptEncoderConfig(PromptLearningConfig, peft_type="P_TUNING"):
    """Input embeddings made by a trained network, before the text (Liu et al. 2021, arXiv:2103.10385)."""

    encoder_reparameterization_type: str = setting(
        "MLP",
        "The network: MLP (three linear layers) or LSTM (bidirectional, as in the paper). It is not saved: only the "
        "virtual tokens that it makes are.",
        label="Prompt encoder",
        choices=("MLP", "LSTM"),
    )
    encoder_hidden_size: int | None = setting(
        None, "Width of the network. None: that of the embeddings.", ge=1, sweepable=True
    )
    encoder_num_layers: int = detail(2, "Layers of the LSTM; the MLP always has three.", ge=1)
    encoder_dropout: float = detail(0.0, "Share dropped between the layers of the LSTM in training.", ge=0, lt=1)
