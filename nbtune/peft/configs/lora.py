# ruff: noqa: RUF009  (setting makes dataclass fields)
"""LoRA's settings."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

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
        help="First weights: True (uniform A, zero B), gaussian (normal A, zero B), or False (both random: the adapter "
        "changes the model from the start; for tests).",
        label="Initialisation",
        choices=(True, False, "gaussian"),
        advanced=True,
    )
    rank_pattern: dict[str, int] = setting(
        factory=dict, help="Another rank for some modules: a name or regular expression and its rank.", advanced=True
    )
    alpha_pattern: dict[str, float] = setting(
        factory=dict, help="Another alpha for some modules: a name or regular expression and its alpha.", advanced=True
    )

    fan_in_fan_out: bool = False  # written by PEFT; a layer shows by its kind how it stores its weight
    lora_bias: bool = pending(False)
    use_dora: bool = pending(False)
    use_qalora: bool = pending(False)
    use_bdlora: Any = pending()
    ensure_weight_tying: bool = pending(False)
    target_parameters: list[str] | None = pending()
    trainable_token_indices: Any = pending()
    layer_replication: Any = pending()
    alora_invocation_tokens: Any = pending()
    loftq_config: dict[str, Any] = pending({})
    eva_config: Any = pending()
    corda_config: Any = pending()
    lora_ga_config: Any = pending()
    velora_config: Any = pending()
    arrow_config: Any = pending()
    kasa_config: Any = pending()
    monteclora_config: Any = pending()
    megatron_config: Any = pending()
    megatron_core: str | None = "megatron.core"  # read by PEFT only together with megatron_config
    qalora_group_size: int = 16  # read by PEFT only together with use_qalora
