"""Settings of the methods that train vectors: of activations, norms, biases or tokens."""

from __future__ import annotations

from nbtune.errors import AdapterError
from nbtune.peft.config import LayerConfig, check_regex, invalid
from nbtune.peft.fields import detail, setting, unchanged


class IA3Config(LayerConfig, peft_type="IA3", absent=("layers_to_transform", "layers_pattern")):
    """Scaled activations (Liu et al. 2022, arXiv:2205.05638)."""

    feedforward_modules: list[str] | str | None = detail(
        None,
        "Those of the adapted modules whose input is scaled instead of the output: endings of paths, or a regular "
        "expression. None: the last linear layer of each feedforward block.",
    )
    init_ia3_weights: bool = unchanged()
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_regex("feedforward_modules", self.feedforward_modules)
        if isinstance(self.target_modules, list) and isinstance(self.feedforward_modules, list):
            # Endings of targets are fine: PEFT writes such files for all-linear (and then cannot read them itself).
            targets = self.target_modules
            strangers = [name for name in self.feedforward_modules if not any(t.endswith(name) for t in targets)]
            if strangers:
                message = f"{', '.join(strangers)}: named in feedforward_modules and not in target_modules."
                raise AdapterError("Feedforward modules are adapted ones", message, "Name them in both.")


class LNTuningConfig(LayerConfig, peft_type="LN_TUNING", absent=("layers_to_transform", "layers_pattern")):
    """Trained norms (Zhao et al. 2023, arXiv:2312.11420)."""


class BeftConfig(LayerConfig, peft_type="BEFT", absent=("exclude_modules", "layers_to_transform", "layers_pattern")):
    """Biases of the value projections (arXiv:2509.15974)."""

    init_weights: bool = unchanged()


class TrainableTokensConfig(
    LayerConfig,
    peft_type="TRAINABLE_TOKENS",
    absent=("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
):
    """Trained embeddings of some tokens."""

    token_indices: list[int] = setting(help="The tokens' ids.", factory=list, label="Tokens")
    init_weights: bool = unchanged("Start at the model's embeddings. False: start random.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modules_to_save:
            raise invalid("modules_to_save", self.modules_to_save, "is no setting of TRAINABLE_TOKENS; LORA has both")
        check_tokens("token_indices", self.token_indices)  # again when their rows are read, for LoRA's


def check_tokens(name: str, tokens: list[int]) -> None:
    """Raise AdapterError for ids that cannot be rows of an embedding."""
    if len(set(tokens)) < len(tokens) or any(token < 0 for token in tokens):
        raise invalid(name, tokens, "must be different ids, counted from 0")
