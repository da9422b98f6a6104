"""Linear layers that keep a copy of their weight in the order in which oneDNN reads it: for generating on a CPU.

A few rows at a time, one for each answer that is written, a product costs what reading the weight costs. A plain weight
[out, in] is put into oneDNN's order anew for every product of two rows or more; a packed one is only read. That takes
as much memory again as the weights do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROWS = 4  # that weights are packed for; others are served as well


class PackedLinear(nn.Linear):
    """As `nn.Linear`, on a CPU in bf16, without gradients. Its weight must not change."""

    packed: Tensor

    @classmethod
    def of(cls, linear: nn.Linear) -> PackedLinear:
        """A layer of the same parameters."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")


def pack(model: nn.Module) -> None:
    """Replace the linear layers of a model in bf16 on a CPU."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.dtype is torch.bfloat16:
                setattr(parent, name, PackedLinear.of(child))
