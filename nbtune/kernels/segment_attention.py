"""Exact causal attention within the segments of a packed row, by plain matrix products and a softmax.

torch's flash attention for CPUs is slow for short segments, above all in its backward pass. Here segments of like
length are one batch (padding at their ends is never seen by a real token, for attention is causal), the query heads
that share a key head are rows of one matrix, and queries come in blocks, which are multiplied only with keys they may
see. Only the inputs are kept for the backward pass, which makes the probabilities again.

Scores of 16-bit inputs are fp32, as in flash attention: those of a trained model reach 30, and rounded to 16 bits they
double the error of the outputs (docs/measurements.md).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nbtune.kernels.segment_layout import Block, Tile, Workspace, padded_row, tiles


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Sequence[int],
    *,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention in which each segment of a packed row sees only itself.

    Args:
        query: Queries [1, heads, T, head_dim], of any strides; usually a view of [T, heads * head_dim].
        key: Keys [1, kv_heads, T, head_dim]; kv_heads divides heads.
        value: Values [1, kv_heads, T, value_dim].
        borders: Where segments begin and end, from 0 to T: segment i is tokens borders[i] to borders[i + 1].
        scaling: Factor on the scores; None is 1 / sqrt(head_dim).
        window: A token sees itself and the `window - 1` before it; None is all before it.
        softcap: Gemma 2's `softcap * tanh(scores / softcap)` (arXiv:2408.00118), after `scaling`.
        sinks: For each head [heads] a score that takes its share of the softmax and has no value (gpt-oss).
        prefix: Keys [1, kv_heads, P, head_dim] and values [1, kv_heads, P, value_dim] that stand before every segment.

    Returns:
        The outputs [1, T, heads, value_dim], contiguous. Gradients of query, key and value have the memory order
        [T, heads, head_dim], so that going back to [T, heads * head_dim] copies nothing.
    """
    options = _Options(tuple(borders), scaling or 1 / math.sqrt(query.shape[-1]), window, softcap)
    return _SegmentAttention.apply(query, key, value, sinks, *(prefix or (None, None)), options)


@dataclasses.dataclass(frozen=True)
class _Options:
    borders: tuple[int, ...]
    scaling: float
    window: int | None
    softcap: float | None


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, prefix_key, prefix_value, options):  # noqa: ANN001, ANN205
        ctx.save_for_backward(query, key, value, sinks, prefix_key, prefix_value)
        ctx.options = options
        return _Attention(query, key, value, sinks, prefix_key, prefix_value, options).forward()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        return *_Attention(*ctx.saved_tensors, ctx.options).backward(grad), None


@dataclasses.dataclass(frozen=True)
class _Probabilities:
    """Those of a block, and what their backward pass needs."""

    values: Tensor  # [segments * heads, group * queries, keys], in the dtype of the inputs
    slope: Tensor | None  # of the soft cap, of the same shape
    sink: Tensor | None  # the sink's share [segments, heads, group, queries]


class _Attention:
    """One call. Inside, tensors are by token of the padded row: queries [tokens, kv_heads, group, head_dim]."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        prefix_key: Tensor | None,
        prefix_value: Tensor | None,
        options: _Options,
    ) -> None:
        self.row = padded_row(options.borders, query.device)
        self.grouped = (key.shape[1], query.shape[1] // key.shape[1])
        self.query = self.row.load(query[0].transpose(0, 1)).unflatten(1, self.grouped)
        self.key, self.value = (self.row.load(tensor[0].transpose(0, 1)) for tensor in (key, value))
        self.sinks, self.prefix_key, self.prefix_value = sinks, prefix_key, prefix_value
        self.before = 0 if prefix_key is None else prefix_key.shape[2]
        self.options = options
        self.dtype = query.dtype
        self.score_dtype = torch.promote_types(query.dtype, torch.float32)
        self.workspace = Workspace(query.device)
        self.masks: dict[tuple[int, int, int], Tensor] = {}
        self.tiles = list(tiles(self.row, *self.grouped, self.before, options.window, self.score_dtype.itemsize))

    def forward(self) -> Tensor:
        output = self.query.new_empty(*self.query.shape[:3], self.value.shape[-1])
        for tile in self.tiles:
            scaled_keys = self._scaled_keys(tile)
            values = self._keys("values", tile, self.value, self.prefix_value)
            for block in tile.blocks:
                probabilities = self._probabilities(tile, block, scaled_keys).values
                batch = self.workspace.take("outputs", self.dtype, *probabilities.shape[:2], values.shape[-1])
                torch.bmm(probabilities, values[:, block.keys], out=batch)
                _store_queries(batch, tile, block, output)
        return self.row.store(output.flatten(1, 2))[None]

    def backward(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = self.row.load_with_zeros(grad[0]).unflatten(1, self.grouped)
        grad_query, grad_key, grad_value = (
            tensor.new_empty(tensor.shape) for tensor in (self.query, self.key, self.value)
        )
        grad_sinks = self._sum_like(self.sinks)
        grad_prefix_key, grad_prefix_value = self._sum_like(self.prefix_key), self._sum_like(self.prefix_value)
        for tile in self.tiles:
            scaled_keys = self._scaled_keys(tile)
            keys = self._keys("keys", tile, self.key, self.prefix_key)
            values = self._keys("values", tile, self.value, self.prefix_value)
            key_sums = self.workspace.take("sums of keys", self.score_dtype, *keys.shape).zero_()
            value_sums = self.workspace.take("sums of values", self.score_dtype, *values.shape).zero_()
            for block in tile.blocks:
                made = self._probabilities(tile, block, scaled_keys)
                output_grads = self._queries("gradients of outputs", tile, block, grad, self.dtype)
                score_grads = self.workspace.take("gradients of scores", self.dtype, *made.values.shape)
                torch.bmm(output_grads, values[:, block.keys].transpose(1, 2), out=score_grads)
                self._add_product(value_sums[:, block.keys], made.values, output_grads)
                if made.sink is not None and grad_sinks is not None:
                    row_sums = torch.linalg.vecdot(score_grads, made.values).view(made.sink.shape)
                    grad_sinks.view(self.grouped)[tile.heads] -= (made.sink * row_sums).sum((0, 3))
                torch._softmax_backward_data(score_grads, made.values, -1, self.dtype, grad_input=score_grads)
                if made.slope is not None:
                    score_grads.mul_(made.slope)
                queries = self._queries("queries", tile, block, self.query, self.dtype)
                self._add_product(key_sums[:, block.keys], score_grads, queries)
                batch = self.workspace.take("gradients of queries", self.dtype, *queries.shape)
                torch.baddbmm(batch, score_grads, keys[:, block.keys], beta=0, alpha=self.options.scaling, out=batch)
                _store_queries(batch, tile, block, grad_query)
            self._store_keys(key_sums.mul_(self.options.scaling), tile, grad_key, grad_prefix_key)
            self._store_keys(value_sums, tile, grad_value, grad_prefix_value)
        by_token = (self.row.store(tensor) for tensor in (grad_query.flatten(1, 2), grad_key, grad_value))
        sums = ((grad_sinks, self.sinks), (grad_prefix_key, self.prefix_key), (grad_prefix_value, self.prefix_value))
        return (
            *(tensor.transpose(0, 1)[None] for tensor in by_token),
            *(None if total is None or of is None else total.to(of.dtype) for total, of in sums),
        )

    def _sum_like(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.zeros_like(tensor, dtype=self.score_dtype)

    # Copies between the padded row and the batch of a tile.

    def _scaled_keys(self, tile: Tile) -> Tensor:
        keys = self._keys("scaled keys", tile, self.key, self.prefix_key, self.score_dtype)
        return keys.mul_(self.options.scaling)

    def _keys(
        self, name: str, tile: Tile, row: Tensor, prefix: Tensor | None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Keys or values [segments * heads, P + length, head_dim] of a tile."""
        source = tile.of(row).transpose(1, 2)
        segments, heads, length, width = source.shape
        batch = self.workspace.take(name, dtype or self.dtype, segments, heads, self.before + length, width)
        batch[:, :, self.before :] = source
        if prefix is not None:
            batch[:, :, : self.before] = prefix[:, tile.heads]
        return batch.flatten(0, 1)

    def _store_keys(self, batch: Tensor, tile: Tile, row: Tensor, prefix: Tensor | None) -> None:
        target = tile.of(row).transpose(1, 2)
        batch = batch.view(*target.shape[:2], -1, target.shape[-1])
        target.copy_(batch[:, :, self.before :])
        if prefix is not None:
            prefix[:, tile.heads] += batch[:, :, : self.before].sum(0, keepdim=True)

    def _queries(self, name: str, tile: Tile, block: Block, row: Tensor, dtype: torch.dtype) -> Tensor:
        """Queries, or the like, of a block [segments * heads, group * queries, head_dim]."""
        source = tile.of(row)[:, block.queries].permute(0, 2, 3, 1, 4)
        batch = self.workspace.take(name, dtype, *source.shape).copy_(source)
        return batch.flatten(2, 3).flatten(0, 1)

    # Scores of a block.

    def _probabilities(self, tile: Tile, block: Block, scaled_keys: Tensor) -> _Probabilities:
        queries = self._queries("queries for scores", tile, block, self.query, self.score_dtype)
        keys = scaled_keys[:, block.keys]
        shape = (*queries.shape[:2], keys.shape[1])
        scores = torch.bmm(queries, keys.transpose(1, 2), out=self.workspace.take("scores", self.score_dtype, *shape))
        slope = None if self.options.softcap is None else self._cap(scores, self.options.softcap)
        size = block.queries.stop - block.queries.start
        by_query = scores.view(-1, self.grouped[1], size, scores.shape[-1])
        self._mask(by_query, block)
        if self.sinks is None:
            sink = None
            torch.softmax(scores, -1, out=scores)
        else:
            sink = self._softmax_with_sinks(by_query.unflatten(0, (tile.segments, -1)), tile)
        if self.dtype != self.score_dtype:
            scores = self.workspace.take("probabilities", self.dtype, *shape).copy_(scores)
        return _Probabilities(scores, slope, sink)

    def _cap(self, scores: Tensor, softcap: float) -> Tensor:
        """Cap scores in place; returns the slope of the cap at each."""
        slope = self.workspace.take("slope", self.score_dtype, *scores.shape)
        torch.tanh(scores.div_(softcap), out=scores)
        torch.mul(scores, scores, out=slope).neg_().add_(1)
        scores.mul_(softcap)
        return slope

    def _mask(self, scores: Tensor, block: Block) -> None:
        """Add -inf in place to the scores [..., queries, keys] of hidden keys."""
        first_query, first_key, last_key = self.before + block.queries.start, block.keys.start, block.keys.stop
        window = self.options.window
        if window is None or last_key - first_key <= window:  # only keys within the block of queries can be hidden
            scores, first_key = scores[..., first_query - first_key :], first_query
        place = (first_query - first_key, scores.shape[-2], scores.shape[-1])
        if place not in self.masks:
            query = torch.arange(place[1], device=scores.device)[:, None] + place[0]
            distance = query - torch.arange(place[2], device=scores.device)
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            mask = torch.zeros(hidden.shape, dtype=scores.dtype, device=scores.device)
            self.masks[place] = mask.masked_fill_(hidden, -torch.inf)
        scores.add_(self.masks[place])

    def _softmax_with_sinks(self, scores: Tensor, tile: Tile) -> Tensor:
        """Softmax in place of scores [segments, heads, group, queries, keys]; returns the share of the sinks."""
        assert self.sinks is not None
        largest = scores.amax(-1)
        torch.softmax(scores, -1, out=scores)
        logsumexp = largest - scores.amax(-1).log()  # the largest probability is exp(largest - logsumexp)
        sinks = self.sinks.to(self.score_dtype).view(self.grouped)[tile.heads, :, None]
        scores.mul_(torch.sigmoid(logsumexp - sinks)[..., None])
        return torch.sigmoid(sinks - logsumexp)

    def _add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Add left^T @ right to `total` [batch, keys, width], which is fp32: a bf16 sum over many blocks stalls."""
        if self.dtype == self.score_dtype:
            total.baddbmm_(left.transpose(1, 2), right)
            return
        part = self.workspace.take("part of a sum", self.dtype, *total.shape)
        total.add_(torch.bmm(left.transpose(1, 2), right, out=part))


def _store_queries(batch: Tensor, tile: Tile, block: Block, row: Tensor) -> None:
    """Write what `_Attention._queries` could have read."""
    target = tile.of(row)[:, block.queries].permute(0, 2, 3, 1, 4)
    target.copy_(batch.view(target.shape))
