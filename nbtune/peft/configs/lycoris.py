"""What LoHa's and LoKr's settings have in common, as in LyCORIS (Yeh et al. 2023, arXiv:2309.14859)."""

from __future__ import annotations

import dataclasses

from nbtune.peft.config import LayerConfig, setting


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class LycorisConfig(LayerConfig):
    """Products of small matrices, of linear layers and convolutions."""

    r: int = setting(8, help="Rank of the factors.", label="Rank r", ge=1, sweepable=True)
    alpha: float = setting(
        8, help="Strength of the update: it is scaled by alpha / r.", label="Alpha", gt=0, sweepable=True
    )
    rank_dropout: float = setting(
        0.0, help="Share of the update's rows, one per output, dropped in training.", ge=0, lt=1, advanced=True
    )
    module_dropout: float = setting(
        0.0, help="How often a layer's whole update is dropped in training.", ge=0, lt=1, advanced=True
    )
    use_effective_conv2d: bool = setting(
        False,
        help="Keep the kernel's dimensions of a convolution apart (FedPara, proposition 3): fewer parameters.",
        advanced=True,
    )
    init_weights: bool | str = setting(
        True,
        help="First weights: True (the update starts at zero) or False (random: for tests).",
        label="Initialisation",
        choices=(True, False),
        advanced=True,
    )
    rank_pattern: dict[str, int] = setting(
        factory=dict, help="Another rank for some modules: a name or regular expression and its rank.", advanced=True
    )
    alpha_pattern: dict[str, float] = setting(
        factory=dict, help="Another alpha for some modules: a name or regular expression and its alpha.", advanced=True
    )
