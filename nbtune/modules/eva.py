"""EVA: the first A of each layer is the main directions of its inputs. Paischer et al. 2024, arXiv:2410.07170."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from nbtune.errors import AdapterError
from nbtune.kernels.low_rank_inits import InputDirections
from nbtune.modules.base import evaluating


@torch.no_grad()
def eva(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Any]],
    ranks: Mapping[str, int],
    *,
    rho: float = 2.0,
    tau: float = 0.99,
    use_label_mask: bool = True,
    label_mask_value: int = -100,
    whiten: bool = False,
    max_batches: int = 1000,
) -> dict[str, Tensor]:
    """A [new rank, in] for each layer by its path: the directions of its inputs that explain most of their variance.

    The sum of `ranks` goes to the directions that explain most in the whole model, at most rho * rank to a layer and
    none to some. B is zero; PEFT multiplies a layer's alpha by its new rank over its old one. The batches, arguments of
    the model, are gone through again and again until the directions stay (tau); padding and, with `use_label_mask`,
    tokens without a label do not count. The model runs in eval mode; its adapters should be off.

    Paischer et al. 2024, arXiv:2410.07170. Raises AdapterError if the directions have not settled after `max_batches`.
    """
    feed = cycle(batches)
    start = next(feed, None)
    if rho < 1 or start is None:
        raise AdapterError("EVA cannot start", f"It needs batches (a list, a DataLoader) and rho >= 1; rho is {rho:g}.")
    label_mask = label_mask_value if use_label_mask else None
    with evaluating(model):
        leader = _leaders(model, layers, start, label_mask)
        sizes: dict[str, int] = dict.fromkeys(leader.values(), 1)
        for path, first in leader.items():
            sizes[first] = max(sizes[first], round(ranks[path] * rho))
        seen = {first: InputDirections(size) for first, size in sizes.items()}
        kept = {path: sizes[first] for path, first in leader.items()}
        for batch in islice(chain([start], feed), max_batches):
            turning = {path: layers[path] for path in seen if not seen[path].converged[: kept[path]].all()}
            if not turning:
                break
            _observe(model, turning, batch, label_mask, lambda path, x: seen[path].update(x, tau))
            if all(directions.rows for directions in seen.values()):
                kept = _shared_out(seen, leader, sum(ranks[path] for path in layers))
        else:
            message = f"After {max_batches} batches the directions of some layers' inputs still turn."
            remedy = f"Give batches of well more than {max(sizes.values())} tokens that count, or lower tau ({tau:g})."
            raise AdapterError("EVA did not settle", message, remedy)
    weights = {path: seen[leader[path]].directions[: kept[path]].clone() for path in layers}
    if whiten:
        weights = {path: A / seen[leader[path]].values[: len(A), None].sqrt() for path, A in weights.items()}
    return weights


def _leaders(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Mapping[str, Any], label_mask: int | None
) -> dict[str, str]:
    """For each layer the first one with the same input (q, k and v have one): what one learns is true of all."""
    first: dict[int, str] = {}
    leader: dict[str, str] = {}

    def compare(path: str, x: Tensor) -> None:
        leader[path] = first.setdefault(hash(x.contiguous().view(torch.uint8).cpu().numpy().tobytes()), path)

    _observe(model, layers, batch, label_mask, compare)
    if missing := [path for path in layers if path not in leader]:
        raise AdapterError("A layer got no input", f"{missing[0]} takes no part in the model's forward pass.")
    return leader


def _observe(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batch: Mapping[str, Any],
    label_mask: int | None,
    take: Callable[[str, Tensor], None],
) -> None:
    """Run the model on a batch and hand on each layer's input at the tokens that count, [tokens, in]."""
    device = next(model.parameters()).device
    batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    counts = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"]).bool()
    if label_mask is not None and "labels" in batch:
        counts = counts & (batch["labels"] != label_mask)
    if not counts.any():
        raise AdapterError("An empty batch", "A calibration batch has no token that counts.", "Leave it out.")

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take_input(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].flatten(0, -2)
            if len(x) != counts.numel():
                message = f"{path} gets {len(x)} of the batch's {counts.numel()} tokens: an expert, or a pooled layer."
                raise AdapterError("EVA cannot follow the tokens", message, "Leave it out of the calibration.")
            take(path, x[counts.flatten().to(x.device)])

        return take_input

    handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()


def _shared_out(seen: Mapping[str, InputDirections], leader: Mapping[str, str], budget: int) -> dict[str, int]:
    """The rank of each layer when the best `budget` directions of all layers are kept."""
    paths = [*seen, *(path for path in leader if path not in seen)]  # a leader comes first, and so has most
    shares = [seen[leader[path]].explained() for path in paths]
    owners = [path for path, share in zip(paths, shares, strict=True) for _ in share]
    best = torch.cat(shares).argsort(descending=True, stable=True)[:budget].tolist()
    kept = Counter(owners[index] for index in best)
    return {path: kept[path] for path in leader}
