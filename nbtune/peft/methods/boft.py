"""BOFT: Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization. Liu et al. 2023, arXiv:2311.06243.

    y = s * W (R^T x) + bias        R = B_m ... B_1 [in, in], s [out]

Each factor B_i is block-diagonal with rotations [b, b] once its inputs are permuted: within every 2^(i - 1) blocks, the
even half-blocks come before the odd ones, so that m factors mix b 2^(m - 1) inputs. Each rotation is the Cayley
transform of a trained matrix [b, b], of which only the skew-symmetric part counts.
"""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, nn

from nbtune.errors import AdapterError
from nbtune.kernels.rotations import butterfly, cayley, dropped_blocks
from nbtune.modules.base import CONVOLUTIONS, features, ones, zeros
from nbtune.peft.configs.rotations import BOFTConfig
from nbtune.peft.methods.rotation import Rotation, inputs


class BOFT(Rotation):
    """Butterfly rotations and a scale per output. PEFT has one factor only, unless it can compile its CUDA kernel."""

    def __init__(self, base: nn.Module, boft_R: Tensor, boft_s: Tensor, dropout: float) -> None:
        super().__init__(base)
        self.boft_R = nn.Parameter(boft_R)  # [m, in / b, b, b]
        self.boft_s = nn.Parameter(boft_s)  # [out, 1], of a convolution [1, out]
        self.dropout = dropout

    @classmethod
    def create(cls, base: nn.Module, config: BOFTConfig, path: str, shared: None) -> Self:
        out_features, width = features(base)[0], inputs(base, path)
        size = _block_size(config, width, path)
        boft_R = zeros(base, config.boft_n_butterfly_factor, width // size, size, size)
        boft_s = ones(base, *((1, out_features) if isinstance(base, CONVOLUTIONS) else (out_features, 1)))
        if not config.init_weights:
            nn.init.normal_(boft_R, std=0.1)
            nn.init.normal_(boft_s, mean=1.0, std=0.1)
        return cls(base, boft_R, boft_s, config.boft_dropout)

    def turned(self, x: Tensor, *, transposed: bool = False, drop: bool = False) -> Tensor:
        blocks = cayley(0.5 * (self.boft_R - self.boft_R.mT))
        if drop and self.dropout:
            blocks = dropped_blocks(blocks, self.dropout)
        return butterfly(x, blocks, transposed=transposed)

    def turned_weight(self, weight: Tensor, *, drop: bool = False) -> Tensor:
        """Return s W R^T."""
        return super().turned_weight(weight, drop=drop) * self.boft_s.reshape(-1, *[1] * (weight.ndim - 1))

    def forward(self, x: Tensor, y: Tensor, base: Any) -> Tensor:
        """Return s (y - bias) + bias for a linear layer's output y [..., out] of the rotated input."""
        return self._scaled(y, base).to(y.dtype) if self.of_input else super().forward(x, y, base)

    def merged_bias(self, bias: Tensor | None, base: nn.Module) -> Tensor | None:
        """The base layer's bias is not scaled; what adapters before this one have added to it is."""
        return self._scaled(bias, base) if bias is not None and self.of_input else bias

    def _scaled(self, y: Tensor, base: Any) -> Tensor:
        s = self.boft_s.flatten()
        return s * y if base.bias is None else s * y + (1 - s) * base.bias


def _block_size(config: BOFTConfig, width: int, path: str) -> int:
    """The size of the blocks. Raises AdapterError where they, and the factors, do not fit the layer's inputs."""
    span = 2 ** (config.boft_n_butterfly_factor - 1)  # blocks that the last factor mixes
    fitting = [
        size for size in range(1, width // span + 1) if width % (size * span) == 0 and (span == 1 or size % 2 == 0)
    ]
    size = config.boft_block_size or width / config.boft_block_num
    if size in fitting:
        return int(size)
    asked = f"boft_block_size={config.boft_block_size}, boft_block_num={config.boft_block_num} and "
    asked += f"boft_n_butterfly_factor={config.boft_n_butterfly_factor}"
    message = f"{asked} do not suit the {width} inputs of {path}."
    remedy = f"Block sizes that do: {', '.join(map(str, fitting))}." if fitting else "Use fewer butterfly factors."
    raise AdapterError("The blocks do not fit", message, remedy)
