"""LoRA's settings."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from nbtune.errors import AdapterError
from nbtune.peft.config import BiasedConfig, pending, setting


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class LoraConfig(BiasedConfig):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685). Names and defaults are those of peft 0.21."""

    peft_type: ClassVar[str] = "LORA"
    only: ClassVar[str] = "lora_only"

    r: int = setting(8, help="Rank of the update.", label="Rank r", ge=1, sweepable=True)
    lora_alpha: float = setting(
        8, help="Strength of the update: it is scaled by lora_alpha / r.", label="Alpha", gt=0, sweepable=True
    )
    lora_dropout: float = setting(
        0.0, help="Share of the adapter's inputs dropped in training.", label="Dropout", ge=0, lt=1, sweepable=True
    )
    use_rslora: bool = setting(
        False,
        help="Scale by lora_alpha / sqrt(r) instead, so that high ranks keep learning (Kalajdzievski 2023).",
        label="rsLoRA",
        advanced=True,
        sweepable=True,
    )
    init_lora_weights: bool | str = setting(
        True,
        help="First weights: True (uniform A, zero B), gaussian (normal A, zero B), orthogonal (both random, B A = 0), "
        "pissa or its fast form pissa_niter_<n> (the base weight's main directions), olora (its QR), eva (the main "
        "directions of the inputs; then call initialize_lora_eva_weights), loftq (what quantising to 4 bits loses), or "
        "False (both random: the adapter changes the model from the start; for tests).",
        label="Initialisation",
        choices=(True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "eva", "loftq"),
        pattern=r"pissa_niter_\d+",
        advanced=True,
    )
    rank_pattern: dict[str, int] = setting(
        factory=dict, help="Another rank for some modules: a name or regular expression and its rank.", advanced=True
    )
    alpha_pattern: dict[str, float] = setting(
        factory=dict, help="Another alpha for some modules: a name or regular expression and its alpha.", advanced=True
    )

    use_dora: bool = setting(
        False,
        help="Also train the length of each row of the weight (DoRA, Liu et al. 2024, arXiv:2402.09353): slower, often "
        "better at low ranks.",
        label="DoRA",
        advanced=True,
        sweepable=True,
    )
    lora_bias: bool = setting(False, help="Give the update a trained bias.", advanced=True)
    target_parameters: list[str] | None = setting(
        None,
        help="Parameters to adapt that are no module's weight, such as mlp.experts.gate_up_proj of a mixture of experts.",
        advanced=True,
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = setting(
        None,
        help="Tokens whose embeddings are trained too: their ids, or ids by the name of the embedding.",
        label="Trained tokens",
        advanced=True,
    )
    loftq_config: dict[str, Any] = setting(
        factory=dict, help="For init loftq: loftq_bits (2, 4 or 8; 4) and loftq_iter (1).", advanced=True
    )
    eva_config: dict[str, Any] | None = setting(
        None, help="For init eva: rho (how far ranks are redistributed; 2), tau (when to stop; 0.99).", advanced=True
    )

    fan_in_fan_out: bool = False  # written by PEFT; a layer shows by its kind how it stores its weight
    use_qalora: bool = pending(False)
    use_bdlora: Any = pending()
    ensure_weight_tying: bool = pending(False)
    layer_replication: Any = pending()
    alora_invocation_tokens: Any = pending()
    corda_config: Any = pending()
    lora_ga_config: Any = pending()
    velora_config: Any = pending()
    arrow_config: Any = pending()
    kasa_config: Any = pending()
    monteclora_config: Any = pending()
    megatron_config: Any = pending()
    megatron_core: str | None = "megatron.core"  # read by PEFT only together with megatron_config
    qalora_group_size: int = 16  # read by PEFT only together with use_qalora

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_dora and self.lora_bias:
            raise AdapterError(
                "use_dora and lora_bias", "DoRA has no place for a bias of the update.", "Switch one off."
            )

    @property
    def trained_tokens(self) -> list[int] | dict[str, list[int]] | None:
        return self.trainable_token_indices

    @property
    def adapted_parameters(self) -> list[str]:
        return self.target_parameters or []
