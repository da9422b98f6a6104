"""RoAd: 3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability.
Liao and Monz 2024, arXiv:2409.00119.

    y = R (W x + bias)        R rotates and scales pairs (i, j) of outputs:
    y_i' = a_i cos(t_i) y_i - b_i sin(u_i) y_j        y_j' = a_j cos(t_j) y_j + b_j sin(u_j) y_i

An output of the first half of a group of outputs is paired with that of the second half. road_1 has one angle and one
scale per pair (t_i = u_i = t_j = u_j, a_i = b_i = a_j = b_j), road_2 per output (t_i = u_i, a_i = b_i), road_4 two per
output.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn

from nbtune.errors import AdapterError
from nbtune.kernels.rotations import rotated_pairs
from nbtune.modules.base import features, ones, zeros
from nbtune.peft.configs.rotations import RoadConfig
from nbtune.peft.layer import Adapter
from nbtune.peft.methods.rotation import nearest_divisor


class Road(Adapter):
    """Rotations of pairs of outputs: the output with its bias, so that merging changes the bias too."""

    def __init__(self, road_theta: Tensor, road_alpha: Tensor, group: int) -> None:
        super().__init__()
        self.road_theta = nn.Parameter(road_theta)  # angles [out / 2], [out] or [2 out]
        self.road_alpha = nn.Parameter(road_alpha)  # scales, as many
        self.group = group

    @classmethod
    def create(cls, base: nn.Module, config: RoadConfig, path: str, shared: None) -> Self:
        out_features, _ = features(base)
        if out_features % config.group_size:
            message = f"group_size={config.group_size} does not divide the {out_features} outputs of {path}."
            even = f"Set group_size to {2 * nearest_divisor(out_features // 2, config.group_size // 2)}."
            remedy = "An odd number has no pairs: leave the module out of target_modules." if out_features % 2 else even
            raise AdapterError("The groups do not fit", message, remedy)
        size = {"road_1": out_features // 2, "road_2": out_features, "road_4": 2 * out_features}[config.variant]
        theta, alpha = zeros(base, size), ones(base, size)
        if not config.init_weights:
            nn.init.normal_(theta, std=0.5)
            nn.init.normal_(alpha, mean=1.0, std=0.5)
        return cls(theta, alpha, config.group_size)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Return R y for y [..., out]."""
        return self.turned(y)

    def merged_weight(self, weight: Tensor, base: nn.Module) -> Tensor:
        return self.turned(weight.mT).mT

    def merged_bias(self, bias: Tensor | None, base: nn.Module) -> Tensor | None:
        return None if bias is None else self.turned(bias)

    def turned(self, y: Tensor) -> Tensor:
        """Return R y for y [..., out], in y's precision."""
        return rotated_pairs(y, self.road_theta, self.road_alpha, self.group)
