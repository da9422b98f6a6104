"""SHiRA: Sparse High Rank Adapters. Bhardwaj et al. 2024, arXiv:2406.13175.

    W' = W + C        C [out, in]: r (in + out) trained entries at random places, 0 elsewhere

The places are in the file as `shira_indices` [2, n], rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from nbtune.errors import AdapterError
from nbtune.kernels.sparse import random_places
from nbtune.modules.base import empty, features, zeros
from nbtune.peft.configs.sparse import ShiraConfig
from nbtune.peft.methods.sparse import SparseAdapter, check_count


class Shira(SparseAdapter):
    file_names: ClassVar[dict[str, str]] = {"values": "shira_weight", "places": "shira_indices"}
    stores_places: ClassVar[bool] = True

    @classmethod
    def create(cls, base: nn.Module, config: ShiraConfig, path: str, shared: None) -> Self:
        sizes = out_features, in_features = features(base)
        count = config.r * (out_features + in_features)
        check_count(count, base, path, "r", out_features * in_features // (out_features + in_features))
        values = zeros(base, count) if config.init_weights else empty(base, count).normal_()
        rows, columns = random_places(sizes, count, config.random_seed, values.device)
        order = (rows * in_features + columns).argsort()  # PEFT numbers the entries row by row
        return cls(values, torch.stack([rows, columns])[:, order].int(), sizes, 1.0)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        places = tensors.get("shira_indices")
        limits = torch.tensor(self.sizes)[:, None]
        if places is not None and not ((places.cpu() >= 0) & (places.cpu() < limits)).all():
            message = f"shira_indices are not all places in a weight of {self.sizes[0]} x {self.sizes[1]}."
            raise AdapterError("Wrong indices", message, "Is the file whole, and of this base model?")
        super().load(tensors)
