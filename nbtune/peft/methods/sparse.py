"""Updates with few values at fixed places of a matrix C, in a basis that a method chooses.

    W' = W + Re(T_out C T_in^T)        W [out, in], C [P_out, P_in] sparse, T_out [out, P_out], T_in [in, P_in]

FourierFT, WaveFT and SHiRA are this with Fourier's basis, wavelets and no basis at all.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from nbtune.errors import AdapterError
from nbtune.kernels.sparse import scattered, sparse_product
from nbtune.modules.base import features
from nbtune.peft.layer import Adapter


class SparseAdapter(Adapter):
    """`values` [n] at `places` [2, n], the rows and columns of C. The basis is that of entries: T is the identity."""

    stores_places: ClassVar[bool] = False  # in the file, or drawn again from a seed
    values: nn.Parameter
    places: Tensor

    def __init__(self, values: Tensor, places: Tensor, sizes: tuple[int, int], scaling: float) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.register_buffer("places", places, persistent=self.stores_places)
        self.sizes = sizes  # (P_out, P_in)
        self.scaling = scaling

    def to_output(self, c: Tensor, size: int) -> Tensor:
        """T c along the last dimension: [..., P] to [..., size]."""
        return c

    def from_input(self, x: Tensor) -> Tensor:
        """T^T x along the last dimension: [..., in] to [..., P_in]."""
        return x

    def delta_weight(self, base: nn.Module) -> Tensor:
        out_features, in_features = features(base)
        c = scattered(self._scaled(), self.places, self.sizes)
        delta = self.to_output(self.to_output(c, in_features).mT, out_features).mT
        return delta.real if delta.is_complex() else delta

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Token by token, T_out (C (T_in^T x)), where that touches fewer numbers than the dense update has."""
        out_features, in_features = features(base)
        tokens = x.numel() // in_features
        if tokens * (out_features + in_features + self.values.shape[-1]) >= out_features * in_features:
            return super().forward(x, y, base)
        values = self._scaled()
        c = sparse_product(self.from_input(x.to(values.dtype)), values, self.places, self.sizes[0])
        added = self.to_output(c, out_features)
        return y + (added.real if added.is_complex() else added).to(y.dtype)

    def _scaled(self) -> Tensor:
        """The values in fp32 at least: there is no FFT in 16 bits."""
        return self.scaling * self.values.to(torch.promote_types(self.values.dtype, torch.float32))


def check_count(count: int, base: nn.Module, path: str, setting: str, most: int) -> None:
    """Raise AdapterError for more values than the layer has entries."""
    out_features, in_features = features(base)
    entries = out_features * in_features
    if count > entries:
        message = f"{path} is {out_features} x {in_features}, {entries} entries; {setting} asks for {count}."
        raise AdapterError(
            "More values than entries", message, f"Set {setting} to at most {most}, or leave the layer out."
        )
