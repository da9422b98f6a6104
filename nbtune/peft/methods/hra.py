"""HRA: Bridging the Gap between Low-rank and Orthogonal Adaptation via Householder Reflection. Yuan et al. 2024,
arXiv:2405.17484.

    y = W H_1 ... H_r x        H_i = I - 2 u_i u_i^T, with unit vectors u_i [in]

No matrix [in, in] is formed. With Gram-Schmidt the u_i are orthogonal.
"""

from __future__ import annotations

import warnings
from typing import Self

from torch import Tensor, nn

from nbtune.errors import AdapterError
from nbtune.kernels.rotations import reflected
from nbtune.modules.base import linear_init
from nbtune.peft.configs.rotations import HRAConfig
from nbtune.peft.methods.rotation import Rotation, inputs


class HRA(Rotation):
    """A chain of reflections. An even number starts as pairs that cancel each other."""

    def __init__(self, base: nn.Module, hra_u: Tensor, orthogonal: bool) -> None:
        super().__init__(base)
        self.hra_u = nn.Parameter(hra_u)  # [in, r]
        self.orthogonal = orthogonal

    @classmethod
    def create(cls, base: nn.Module, config: HRAConfig, path: str, shared: None) -> Self:
        width = inputs(base, path)
        if config.apply_GS and config.r > width:
            message = f"r={config.r}, but no more than {width} vectors are orthogonal in the {width} inputs of {path}."
            raise AdapterError("The rank does not fit", message, f"Set r to {width} or less, or apply_GS to False.")
        # Equal vectors have no Gram-Schmidt basis; PEFT takes what rounding makes of it.
        in_pairs = config.init_weights and config.r % 2 == 0 and not config.apply_GS
        if config.init_weights and config.r % 2 and not config.inference_mode:
            warnings.warn(f"r={config.r} is odd, so HRA starts with a changed model.", stacklevel=2)
        hra_u = linear_init(base, width, config.r // 2 if in_pairs else config.r)
        return cls(base, hra_u.repeat_interleave(2, dim=1) if in_pairs else hra_u, config.apply_GS)

    def turned(self, x: Tensor, *, transposed: bool = False, drop: bool = False) -> Tensor:
        """Return x H_r ... H_1, or transposed x H_1 ... H_r, for x [..., in]."""
        return reflected(x, self.hra_u, transposed=transposed, orthogonal=self.orthogonal)
