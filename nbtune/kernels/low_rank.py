"""Several low-rank adapters of one layer as one: the combination types of PEFT's `add_weighted_adapter`.

    kind, rank = plan_combination([8, 8], [0.7, 0.3], "ties", density=0.5)
    combine([LowRank(A1, B1, 2.0), LowRank(A2, B2, 2.0)], [0.7, 0.3], kind, rank=rank, density=0.5)

| type | result |
|---|---|
| `cat` | the weighted sum of the updates s B A, exact; the ranks add up |
| `svd` | the best approximation of that sum with the given rank |
| `linear` | weighted sums of the A and of the B: cheap, and only near the sum of the updates |
| `magnitude_prune` | linear, of the largest entries |
| `ties` | of the largest entries, the mean of those with the majority's sign; Yadav et al. 2023, arXiv:2306.01708 |
| `dare_linear`, `dare_ties` | of entries kept at random and scaled up; Yu et al. 2023, arXiv:2311.03099 |
| `<one of these four>_svd` | the same with the updates in place of the A and the B, then `svd` |

DARE takes random numbers from torch's global generator in PEFT's order: layer by layer as the model has them, there
adapter by adapter, first all A and then all B (or the updates). PEFT draws the first weights of the new adapter before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nbtune.errors import AdapterError

_PRUNED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATION_TYPES = ("linear", "cat", "svd", *_PRUNED, *(f"{kind}_svd" for kind in _PRUNED))


class LowRank(NamedTuple):
    """The update scaling * B @ A of one layer; those of a convolution have its kernel's dimensions behind."""

    A: Tensor  # [r, in, ...]
    B: Tensor  # [out, r, ...]
    scaling: float


def plan_combination(
    ranks: Sequence[int],
    weights: Sequence[float],
    combination_type: str = "svd",
    *,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> tuple[str, int]:
    """The type and the rank of a combination, after a look at everything that can be wrong with it.

    As in PEFT a single adapter is only scaled, by `linear`, whatever the type. Raises AdapterError.
    """
    rank = combined_rank(ranks, combination_type, svd_rank)
    if len(weights) != len(ranks):
        message = f"There are {len(ranks)} adapters and {len(weights)} weights."
        raise AdapterError("Weights and adapters differ", message, "Give one weight per adapter.")
    if len(ranks) == 1:
        return "linear", ranks[0]
    if combination_type.removesuffix("_svd") in _PRUNED and (density is None or not 0 < density <= 1):
        raise _refused("density", density, f"more than 0 and at most 1 with {combination_type}")
    if majority_sign_method not in ("total", "frequency"):
        raise _refused("majority_sign_method", majority_sign_method, "total or frequency")
    if svd_clamp is not None and not 0 <= svd_clamp <= 1:
        raise _refused("svd_clamp", svd_clamp, "a quantile, between 0 and 1")
    return combination_type, rank


def combined_rank(ranks: Sequence[int], combination_type: str = "svd", svd_rank: int | None = None) -> int:
    """The rank of a combination of adapters of these ranks (the largest of each, where it has a rank_pattern).

    Raises AdapterError for an unknown type, for no adapter, and for different ranks where they must be equal.
    """
    if combination_type not in COMBINATION_TYPES:
        raise _refused("combination_type", combination_type, f"one of {', '.join(COMBINATION_TYPES)}")
    if not ranks:
        raise AdapterError("No adapters", "There is nothing to combine.", "Name one adapter or more.")
    if svd_rank is not None and svd_rank < 1:
        raise _refused("svd_rank", svd_rank, "1 or more")
    if combination_type.endswith("svd"):
        return svd_rank or max(ranks)
    if combination_type == "cat":
        return sum(ranks)
    if len(set(ranks)) > 1:
        message = f"{combination_type} needs adapters of one rank; these have {', '.join(map(str, ranks))}."
        raise AdapterError("Different ranks", message, "Use svd or cat, or one of the types that end in _svd.")
    return ranks[0]


def _refused(name: str, value: Any, rule: str) -> AdapterError:
    return AdapterError(f"{name} cannot be {value!r}", f"It must be {rule}.")


@torch.no_grad()
def combine(
    factors: Sequence[LowRank],
    weights: Sequence[float],
    combination_type: str = "svd",
    *,
    rank: int,
    svd_clamp: float | None = None,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    fan_in_fan_out: bool = False,
) -> LowRank:
    """One layer's update from those of the adapters that it has; type and rank are those of `plan_combination`.

    The result has scaling 1, the first adapter's precision and exactly `rank`: where the layer has fewer directions,
    the last ones are zeros. `fan_in_fan_out` says that the base weight lies as [in, out] (Conv1D, Embedding): DARE's
    random numbers are drawn in that order. `svd_driver` is for CUDA, see torch.linalg.svd. Raises AdapterError.
    """
    combined_rank([len(A) for A, _, _ in factors], combination_type)
    like_A, like_B, _ = factors[0]
    if like_A.is_meta:
        return LowRank(padded(like_A, 0, rank), padded(like_B, 1, rank), 1.0)
    dtype = torch.float64 if like_A.dtype is torch.float64 else torch.float32
    As = [A.to(dtype).flatten(1) for A, _, _ in factors]  # [r, in * kernel]
    Bs = [B.to(dtype).flatten(1) for _, B, _ in factors]  # [out, r]
    scales = [weight * factor.scaling for weight, factor in zip(weights, factors, strict=True)]
    how = (combination_type.removesuffix("_svd"), density, majority_sign_method)
    all_A, all_B = torch.cat([scale * A for scale, A in zip(scales, As, strict=True)]), torch.cat(Bs, dim=1)
    if combination_type == "cat":
        A, B = all_A, all_B
    elif combination_type == "svd" and svd_clamp is None and len(all_A) >= rank:
        # The same without a matrix of the weight's size: a 4096 x 4096 layer takes milliseconds, not a minute.
        (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(all_B), torch.linalg.qr(all_A.T)
        A, B = _truncated_svd(R_B @ R_A.T, rank, None, svd_driver)
        A, B = A @ Q_A.T, Q_B @ B
    elif combination_type.endswith("svd"):
        updates = [factor.scaling * (B @ A) for factor, A, B in zip(factors, As, Bs, strict=True)]
        updates = [update.T if fan_in_fan_out else update for update in updates]
        merged = _merged(updates, weights, *how)
        A, B = _truncated_svd(merged.T if fan_in_fan_out else merged, rank, svd_clamp, svd_driver)
    else:
        roots = [math.sqrt(abs(scale)) for scale in scales]
        A = _merged(As, [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)], *how)
        B = _merged(Bs, roots, *how)
    A, B = padded(A, 0, rank).to(like_A.dtype), padded(B, 1, rank).to(like_B.dtype)
    return LowRank(A.reshape(rank, *like_A.shape[1:]), B.reshape(len(B), rank, *like_B.shape[2:]), 1.0)


def combine_tensors(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of tensors of one shape and precision: how PEFT combines IA3's vectors."""
    return torch.stack([weight * tensor.detach() for weight, tensor in zip(weights, tensors, strict=True)]).sum(0)


def _merged(tensors: list[Tensor], weights: Sequence[float], kind: str, density: float | None, sign: str) -> Tensor:
    """The matrices [m, n] as one; signs are elected before the weights count."""
    if kind in _PRUNED and density is not None and density < 1:
        tensors = [(_at_random if kind.startswith("dare") else _largest)(tensor, density) for tensor in tensors]
    stacked = torch.stack(tensors)  # [adapters, m, n]
    weighted = stacked * stacked.new_tensor(weights).view(-1, 1, 1)
    if not kind.endswith("ties"):
        return weighted.sum(0)
    votes = stacked if sign == "total" else stacked.sign()
    agrees = stacked.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _largest(tensor: Tensor, density: float) -> Tensor:
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    return torch.zeros_like(tensor).flatten().index_fill(0, kept, 1).view(tensor.shape) * tensor


def _at_random(tensor: Tensor, density: float) -> Tensor:
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def _truncated_svd(matrix: Tensor, rank: int, clamp: float | None, driver: str | None) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of the best approximation of [out, in]; the singular values are in B."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False, driver=driver)
    A, B = Vh[:rank], U[:, :rank] * S[:rank]
    if clamp is not None:
        high = torch.quantile(torch.cat([B.flatten(), A.flatten()]), clamp).item()
        A, B = A.clamp(-high, high), B.clamp(-high, high)
    return A, B


def padded(factor: Tensor, dim: int, rank: int) -> Tensor:
    """The factor with zeros behind, up to the rank."""
    missing = [rank - size if i == dim else size for i, size in enumerate(factor.shape)]
    return torch.cat([factor, factor.new_zeros(missing)], dim)
