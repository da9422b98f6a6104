"""RMSNorms: a module with one vector of weights and one number, its epsilon."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nbtune.kernels.rms_norm import rms_norm

# (offset of the weight, whether rows are rounded before they are scaled): Llama's, OLMo 2's, Gemma's.
FORMS = ((0.0, True), (0.0, False), (1.0, False))


class FusedNorm:
    """The forward pass of an RMSNorm."""

    kind = "norm"

    def __init__(self, module: Any, eps: float, offset: float, cast_first: bool) -> None:
        self.module, self.original = module, module.forward
        self.eps, self.offset, self.cast_first = eps, offset, cast_first

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.module.weight, self.eps, offset=self.offset, cast_first=self.cast_first)


def fused_norms(module: nn.Module) -> list[FusedNorm]:
    """How the module may be computed, if it is built like an RMSNorm."""
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    numbers = [value for value in vars(module).values() if type(value) is float]
    if list(own) != ["weight"] or own["weight"].ndim != 1 or len(numbers) != 1 or list(module.children()):
        return []
    return [FusedNorm(module, numbers[0], *form) for form in FORMS]
