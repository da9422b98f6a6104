"""LoRA's settings, and AdaLoRA's."""

from __future__ import annotations

import warnings
from typing import Any

from nbtune._settings import pending
from nbtune.errors import AdapterError
from nbtune.peft.config import BiasedConfig, invalid
from nbtune.peft.fields import detail, pattern, rank, setting, share, strength, unchanged


class LoraConfig(BiasedConfig, peft_type="LORA"):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685)."""

    r: int = rank()
    lora_alpha: float = strength(8, "lora_alpha / r")
    lora_dropout: float = share()
    use_rslora: bool = detail(
        False,
        "Scale by lora_alpha / sqrt(r) instead, so that high ranks keep learning (Kalajdzievski 2023).",
        label="rsLoRA",
        sweepable=True,
    )
    init_lora_weights: bool | str = detail(
        True,
        "First weights: True (uniform A, zero B), gaussian (normal A, zero B), orthogonal (both random, B A = 0), "
        "pissa or its fast form pissa_niter_16 or another number (the base weight's main directions), olora (its QR), "
        "eva (the main directions of the inputs; then call initialize_lora_eva_weights), loftq (what quantising to 4 "
        "bits loses), or False (both random: the adapter changes the model from the start; for tests).",
        label="Initialisation",
        choices=(True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "eva", "loftq"),
        pattern=r"pissa_niter_\d+",
    )
    rank_pattern: dict[str, int] = pattern("rank")
    alpha_pattern: dict[str, float] = pattern("alpha")
    use_dora: bool = detail(
        False,
        "Also train the length of each row of the weight (DoRA, arXiv:2402.09353): slower, often better at low ranks.",
        label="DoRA",
        sweepable=True,
    )
    lora_bias: bool = detail(False, "Give the update a trained bias.")
    target_parameters: list[str] | None = detail(
        None, "Parameters to adapt that are no module's weight, such as mlp.experts.gate_up_proj of mixed experts."
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = detail(
        None,
        "Tokens whose embeddings are trained too: their ids, or ids by the name of the embedding.",
        label="Trained tokens",
    )
    loftq_config: dict[str, Any] = detail(
        help="For init loftq: loftq_bits (2, 4 or 8; 4) and loftq_iter (1).", factory=dict
    )
    eva_config: dict[str, Any] | None = detail(
        None, "For init eva: rho (how far ranks are redistributed; 2), tau (when to stop; 0.99)."
    )

    fan_in_fan_out: bool = False
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
            message = "DoRA has no place for a bias of the update."
            raise AdapterError("use_dora and lora_bias", message, "Switch one off.")

    @property
    def trained_tokens(self) -> list[int] | dict[str, list[int]] | None:
        return self.trainable_token_indices

    @property
    def adapted_parameters(self) -> list[str]:
        return self.target_parameters or []


class AdaLoraConfig(LoraConfig, peft_type="ADALORA"):
    """Low-rank adapters that move rank to where it counts (Zhang et al. 2023, arXiv:2303.10512).

    Unlike PEFT's, `total_step` may wait: a run knows how many steps it has.
    """

    only = "lora_only"
    r: int = 8  # not used, as in PEFT
    target_r: int = setting(8, "Mean rank at the end.", label="Final rank", ge=1, sweepable=True)
    init_r: int = setting(12, "Rank of every module at the start.", label="First rank", ge=1, sweepable=True)
    tinit: int = detail(0, "Steps before the first rank is taken away.", unit="steps", ge=0)
    tfinal: int = detail(0, "Steps at the end in which ranks stay.", unit="steps", ge=0)
    deltaT: int = detail(1, "Steps from one reallocation to the next.", unit="steps", ge=1)
    beta1: float = detail(0.85, "Decay of the average of sensitivities.", gt=0, lt=1)
    beta2: float = detail(0.85, "Decay of the average of their uncertainty.", gt=0, lt=1)
    orth_reg_weight: float = detail(0.5, "Weight of the penalty that keeps A and B orthogonal.", ge=0, sweepable=True)
    total_step: int | None = detail(None, "Optimiser steps of the whole training; a run fills it in.", unit="steps")
    # Which of the first ranks are left, written after training.
    rank_pattern: dict[str, list[bool]] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    init_lora_weights: bool = unchanged()

    # LoRA's, of which PEFT's AdaLoRA takes no notice.
    alpha_pattern: dict[str, float] = pending({})
    use_rslora: bool = pending(False)
    use_dora: bool = pending(False)
    lora_bias: bool = pending(False)
    target_parameters: list[str] | None = pending()
    loftq_config: dict[str, Any] = pending({})
    eva_config: dict[str, Any] | None = pending()

    @property
    def patterns(self) -> dict[str, dict[str, Any]]:
        return {}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r != 8:
            warnings.warn("AdaLoRA does not use r; its ranks are init_r and target_r.", stacklevel=3)
        if self.total_step is None:
            return
        if self.total_step <= 0:
            raise invalid("total_step", self.total_step, "must be more than 0")
        if self.tinit >= self.total_step - self.tfinal:
            message = f"tinit {self.tinit} and tfinal {self.tfinal} leave nothing of total_step {self.total_step}."
            raise AdapterError("No steps to move ranks in", message, "Lower tinit or tfinal, or train longer.")
