"""Several adapters on one flat row, each on a stretch of its own: the base layers run once, over all tokens.

    stretches = Stretches([Stretch("a", (0, 100), draws_a), Stretch("b", (100, 180), draws_b)])
    with stretched(model), fused(model), stretches.within(state):
        model.get_decoder()(...)        # tokens 0 to 99 by adapter a, 100 to 179 by adapter b

A layer adds to each stretch what its adapter alone would: the same equations on the same numbers, whatever the method.
Plain LoRAs go through the kernels (fused/linear.py), which know stretches; here is what serves every other method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nbtune.errors import AdapterError
from nbtune.peft.layer import ActiveAdapters, AdapterLayer, Replacement, Several
from nbtune.peft.rows import Rows


class Draws:
    """The random numbers of one adapter: they go on from where torch's own generators stand when this is made."""

    def __init__(self, device: torch.device) -> None:
        self.generator = torch.Generator()
        self.generator.set_state(torch.get_rng_state())
        self._device = device if device.type == "cuda" else None
        self._on_device = torch.cuda.get_rng_state(device) if self._device is not None else None

    def copy(self) -> Draws:
        """Others that begin where these stand."""
        other = Draws.__new__(Draws)
        other.generator, other._device, other._on_device = self.generator.clone_state(), self._device, self._on_device
        return other

    def are_next(self) -> bool:
        """Whether torch's own generators stand there still: nothing was drawn from them."""
        same = torch.equal(self.generator.get_state(), torch.get_rng_state())
        if self._device is None or self._on_device is None:
            return same
        return same and torch.equal(self._on_device, torch.cuda.get_rng_state(self._device))

    def put_back(self) -> None:
        """Have torch's own generators go on from there."""
        torch.set_rng_state(self.generator.get_state())
        if self._device is not None and self._on_device is not None:
            torch.cuda.set_rng_state(self._on_device, self._device)

    @contextmanager
    def within(self) -> Iterator[None]:
        """Inside, torch's own generators draw these numbers; afterwards they are as they were."""
        with torch.random.fork_rng([] if self._device is None else [self._device]):
            self.put_back()
            yield
            self.generator.set_state(torch.get_rng_state())
            if self._device is not None:
                self._on_device = torch.cuda.get_rng_state(self._device)


@dataclasses.dataclass(frozen=True)
class Stretch:
    """The tokens of one adapter."""

    name: str
    borders: tuple[int, int]  # from the first token to the one after the last
    draws: Draws


class Stretches(Rows):
    """The adapters of a flat row [1, T], in the order of their tokens, which they share among them."""

    def __init__(self, parts: Sequence[Stretch]) -> None:
        super().__init__([part.name for part in parts])
        self.parts = tuple(parts)
        self.tokens = parts[-1].borders[1]

    @contextmanager
    def within(self, state: ActiveAdapters) -> Iterator[None]:
        """Inside, forward passes of the model with this state are of such a row."""
        before, state.rows = state.rows, self
        try:
            yield
        finally:
            state.rows = before

    def dim(self, x: Tensor, path: str) -> int:
        """Which dimension of a layer's input is the row's tokens: routers see them without the batch.

        Raises AdapterError where none is, as in an expert, which is not told whose tokens it gets.
        """
        if x.ndim >= 2 and x.shape[:2] == (1, self.tokens):
            return 1
        if x.ndim == 2 and len(x) == self.tokens:
            return 0
        message = f"{path} got an input of shape {tuple(x.shape)}, and the row has {self.tokens} tokens."
        raise AdapterError("Whose tokens these are cannot be told", message, "Train these adapters one by one.")


@contextmanager
def stretched(model: nn.Module) -> Iterator[None]:
    """Inside, the layers of `model` that have adapters serve `Stretches`, too. Enter `fused` after this."""
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    for layer in layers:
        layer.__dict__["forward"] = _Stretched(layer)
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


class _Stretched:
    """The forward pass of a layer with adapters of any method."""

    def __init__(self, layer: AdapterLayer) -> None:
        self.layer, self.original = layer, layer.forward

    def __call__(self, x: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        rows = self.layer.state.rows
        if not isinstance(rows, Stretches):
            return self.original(x, *args, **kwargs)
        mine = [parts(self.layer.adapters[p.name]) if p.name in self.layer.adapters else () for p in rows.parts]
        if not any(mine):
            return self.layer.base_layer(x, *args, **kwargs)
        dim = rows.dim(x, self.layer.path)
        pieces = [x.narrow(dim, part.borders[0], part.borders[1] - part.borders[0]) for part in rows.parts]
        if any(isinstance(adapter, Replacement) for adapters in mine for adapter in adapters):
            if args or kwargs:
                message = f"{self.layer.path} is replaced by an adapter, and takes more than the tokens' hidden states."
                raise AdapterError("Whose tokens these are cannot be told", message, "Train these adapters one by one.")
            return torch.cat([self._alone(p, piece) for p, piece in zip(rows.parts, pieces, strict=True)], dim)
        return self._together(x, dim, pieces, rows, mine, args, kwargs)

    def _alone(self, part: Stretch, x: Tensor) -> Tensor:
        """The output for one stretch, by the layer itself."""
        with alone(self.layer.state, part.name), part.draws.within():
            return self.original(x)

    def _together(
        self,
        x: Tensor,
        dim: int,
        pieces: list[Tensor],
        rows: Stretches,
        mine: list[tuple[Any, ...]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """One pass through the base layer, as in `AdapterLayer.forward`, and each adapter on its stretch."""
        base = self.layer.base_layer
        inputs = [[piece] for piece in pieces]  # of the adapters of each stretch, from the last, and of the base
        if any(adapter.rotates for adapters in mine for adapter in adapters):
            for part, seen, adapters in zip(rows.parts, inputs, mine, strict=True):
                with part.draws.within():
                    for adapter in reversed(adapters):
                        seen.append(adapter.before(seen[-1]))
            y = base(torch.cat([seen.pop() for seen in inputs], dim), *args, **kwargs)
        else:
            y = base(x, *args, **kwargs)
            inputs = [[piece] * len(adapters) for piece, adapters in zip(pieces, mine, strict=True)]
        found = []
        for part, seen, adapters in zip(rows.parts, inputs, mine, strict=True):
            out = y.narrow(dim, part.borders[0], part.borders[1] - part.borders[0])
            with part.draws.within():
                for adapter in adapters:
                    out = adapter(seen.pop(), out, base)
            found.append(out)
        return torch.cat(found, dim)


@contextmanager
def alone(state: ActiveAdapters, name: str) -> Iterator[None]:
    """Inside, this adapter is the only active one, for all tokens."""
    rows, active = state.rows, state.active
    state.rows = None
    state.update(active=(name,))
    try:
        yield
    finally:
        state.rows = rows
        state.update(active=active)


def parts(adapter: nn.Module) -> tuple[Any, ...]:
    """The adapters of one name in a layer, one after the other."""
    return tuple(adapter.parts) if isinstance(adapter, Several) else (adapter,)
