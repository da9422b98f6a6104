"""Linear layer and cross-entropy in one, without the logits.

The logits of a batch are its largest tensor (2,048 tokens of a 49,152-word vocabulary in fp32: 384 MiB, held two or
three times by the usual loss). Here rows without a label are dropped first, the rest go through the head in chunks, and
each chunk's gradient is made in place of its logits, so that the backward pass only scales what is stored.

A chunk is large enough for the matrix products to be efficient. What is done element by element goes through it in
blocks of rows that stay in the processor's cache, in fp32: one softmax gives the loss, its gradient and the entropy.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nbtune.kernels.casts import autocast
from nbtune.kernels.triton import use_triton

IGNORE_INDEX = -100
CHUNK_BYTES = 64 * 2**20  # fp32 logits of one chunk; held in the dtype of the hidden states
BLOCK_BYTES = 4 * 2**20  # fp32 logits of one block: with its softmax a share of the L3 cache


class LossOutput(NamedTuple):
    """The loss, and what else the softmax of the labelled rows tells; only the loss has a gradient."""

    loss: Tensor
    """Summed over the labelled rows and divided by `num_items`; a scalar, zero where no row has a label."""
    correct: Tensor
    """Number of labelled rows whose label has the largest logit."""
    entropy: Tensor
    """Sum of the labelled rows' entropies, nats."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    num_items: int | Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    chunk_bytes: int | None = None,
) -> LossOutput:
    """Cross-entropy of `hidden @ weight.T + bias` against `labels`, in fp32 (fp64 for fp64).

    Args:
        hidden: Hidden states [N, D].
        weight: The output head [V, D].
        labels: Target of each row [N], already shifted; rows with -100 carry no loss.
        bias: Bias of the head [V].
        num_items: What the summed loss is divided by; None is the number of labelled rows.
        softcap: Gemma 2's `softcap * tanh(logits / softcap)` (arXiv:2408.00118), after `scale`.
        scale: Factor on the logits (Cohere's `logit_scale`, one over Granite's `logits_scaling`).
        label_smoothing: Share of the target that all V words have alike (arXiv:1512.00567), as in transformers.
        chunk_bytes: Bound on the logits of a chunk, were they all in fp32; None is `chunk_budget`.
    """
    hidden, labels, divisor = _labelled(hidden, labels, num_items)
    logits = _Logits(scale, softcap, label_smoothing)
    chunk = _chunk_rows(labels, weight.shape[0], chunk_bytes)
    return LossOutput(*_LinearCrossEntropy.apply(hidden, weight, bias, labels, divisor, logits, chunk))


def head_cross_entropy(
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    *,
    vocabulary: int,
    num_items: int | Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    chunk_bytes: int | None = None,
) -> LossOutput:
    """`linear_cross_entropy` for a head that is more than a matrix, such as one with adapters.

    `head` maps hidden states [N, D] to logits [N, `vocabulary`]; the rest is as there. Its parameters' gradients are
    made in the forward pass too, so `head` runs once, and nothing of it is kept for the backward pass.
    """
    hidden, labels, divisor = _labelled(hidden, labels, num_items)
    logits = _Logits(scale, softcap, label_smoothing)
    chunk = _chunk_rows(labels, vocabulary, chunk_bytes)
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return LossOutput(*_HeadCrossEntropy.apply(hidden, labels, divisor, logits, chunk, head, vocabulary, *trained))


def cross_entropy_of_head(
    head: nn.Module, hidden: Tensor, labels: Tensor, *, vocabulary: int, **options: Any
) -> LossOutput:
    """`linear_cross_entropy` where `head` is a matrix, else `head_cross_entropy`; `options` are those of both.

    Under autocast the hidden states are cast as a linear layer's input would be.
    """
    hidden = autocast(hidden)
    if type(head) is nn.Linear:
        return linear_cross_entropy(hidden, head.weight, labels, bias=head.bias, **options)
    return head_cross_entropy(head, hidden, labels, vocabulary=vocabulary, **options)


def chunk_budget(device: torch.device) -> int:
    """Bytes of fp32 logits in a chunk: on CUDA an eighth of the free memory, up to 1 GiB; else `CHUNK_BYTES`."""
    if device.type != "cuda":
        return CHUNK_BYTES
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    return min(max(free // 8, CHUNK_BYTES), 2**30)


def _labelled(hidden: Tensor, labels: Tensor, num_items: int | Tensor | None) -> tuple[Tensor, Tensor, int | Tensor]:
    """The rows with a label, their labels, and what the sum of their losses is divided by."""
    rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    if isinstance(num_items, Tensor):
        num_items = num_items.to(hidden.device)
    return hidden[rows], labels[rows], max(len(rows), 1) if num_items is None else num_items


def _chunk_rows(labels: Tensor, vocabulary: int, budget: int | None) -> int:
    """Rows of a chunk: as few chunks as the budget allows, all of about one size."""
    most = max(1, (chunk_budget(labels.device) if budget is None else budget) // (4 * vocabulary))
    chunks = max(1, math.ceil(len(labels) / most))
    return max(1, math.ceil(len(labels) / chunks))


def _block_rows(rows: int, row_bytes: int, device: torch.device) -> int:
    """Rows of a block. On a GPU a block is the whole chunk: there launches cost more than the cache saves."""
    return min(rows, max(1, BLOCK_BYTES // row_bytes)) if device.type == "cpu" else rows


class _Logits(NamedTuple):
    """What is done to the head's product on its way to the loss."""

    scale: float
    softcap: float | None
    smoothing: float

    def sums(
        self, product: Tensor, labels: Tensor, scratch: tuple[Tensor, Tensor], *, gradient: Tensor | None
    ) -> Tensor:
        """Loss, correct rows and entropy, summed over the rows of a chunk [3], in the dtype of `scratch`.

        Args:
            product: What the head gives [C, V].
            labels: [C].
            scratch: Two blocks of rows to compute in, both [B, V], fp32 or fp64; Triton needs none.
            gradient: Becomes the gradient of the summed loss by the scaled product [C, V]; may be `product` itself.
        """
        if use_triton(product):
            from nbtune.kernels.triton.cross_entropy import cross_entropy

            options = {"scale": self.scale, "softcap": self.softcap, "smoothing": self.smoothing}
            return cross_entropy(product, labels, **options, gradient=gradient)
        sums = scratch[0].new_zeros(3)
        size = len(scratch[0])
        for start in range(0, len(labels), size):
            stop = min(start + size, len(labels))
            logits, softmax = (block[: stop - start] for block in scratch)
            logits.copy_(product[start:stop])
            sums += self._block_(logits, softmax, labels[start:stop, None], gradient is not None)
            if gradient is not None:
                gradient[start:stop] = softmax
        return sums

    def _block_(self, logits: Tensor, softmax: Tensor, labels: Tensor, wants_gradient: bool) -> Tensor:
        """The sums of one block [3]. `logits` is used up and `softmax` becomes the gradient, both [B, V]."""
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        best = _argmax(logits)  # [B, 1]
        largest = logits.gather(1, best)
        logits -= largest  # or the entropy below would be a difference of large numbers
        torch.softmax(logits, 1, out=softmax)

        normaliser = -softmax.gather(1, best).log()  # log of the sum of exponentials
        entropy = normaliser.squeeze(1) - torch.linalg.vecdot(softmax, logits)
        expected = logits.gather(1, labels)
        if self.smoothing:
            expected = torch.lerp(expected, logits.mean(1, keepdim=True), self.smoothing)
        sums = torch.stack([(normaliser - expected).sum(), (best == labels).sum(), entropy.sum()])

        if wants_gradient:
            softmax.scatter_add_(1, labels, softmax.new_full(labels.shape, self.smoothing - 1))
            if self.smoothing:
                softmax -= self.smoothing / softmax.shape[1]
            if self.softcap is not None:  # whose slope is 1 - (logits / softcap)^2
                logits += largest
                softmax.addcmul_(softmax, logits.square_(), value=-(self.softcap**-2))
        return sums


def _argmax(logits: Tensor) -> Tensor:
    """`logits.argmax(1, keepdim=True)` [B, 1] of [B, V], on a CPU seven times as fast, for torch has no vector code
    for it: first the group of columns with the largest maximum, then the column in that group.
    """
    width = math.gcd(logits.shape[1], 256)
    if width < 32:
        return logits.argmax(1, keepdim=True)
    groups = logits.unflatten(1, (-1, width))
    group = groups.amax(2).argmax(1, keepdim=True)
    columns = torch.take_along_dim(groups, group[:, :, None], 1).squeeze(1)  # [B, width]
    return group * width + columns.argmax(1, keepdim=True)


def _scratch(hidden: Tensor, vocabulary: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Two blocks of logits [B, V] in the precision that the loss is computed in; empty where Triton computes it."""
    dtype = _precision(hidden)
    rows = 0 if use_triton(hidden) else _block_rows(chunk, dtype.itemsize * vocabulary, hidden.device)
    block = hidden.new_empty(rows, vocabulary, dtype=dtype)
    return block, torch.empty_like(block)


def _precision(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right` [V, D]; where `total` is of a wider dtype, in blocks of its rows that stay in cache."""
    if total.dtype == right.dtype:
        total.addmm_(left, right)
        return
    size = _block_rows(len(total), total.element_size() * total.shape[1], total.device)
    for rows, of_left in zip(total.split(size), left.split(size), strict=True):
        rows += of_left @ right


def _scaled(tensor: Tensor, factor: float | Tensor) -> Tensor:
    """`tensor * factor` with one rounding: in bf16 the factor itself would lose two digits."""
    return (tensor.to(_precision(tensor)) * factor).to(tensor.dtype)


def _times(saved: Tensor | None, grad_output: Tensor) -> Tensor | None:
    """`saved * grad_output`; `saved` itself where that is known to be one without waiting for a GPU."""
    if saved is None or (grad_output.device.type == "cpu" and grad_output == 1):
        return saved
    return saved * grad_output.to(saved.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, labels, divisor, logits: _Logits, chunk: int):  # noqa: ANN001, ANN205
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        precision, scratch = _precision(hidden), _scratch(hidden, len(weight), chunk)
        head, offset = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        factor = logits.scale / divisor
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Summed in fp32 over the chunks: in bf16 a sum of thousands of small terms stalls.
        grad_weight = torch.zeros_like(weight, dtype=precision) if wants_weight else None
        grad_bias = hidden.new_zeros(len(weight), dtype=precision) if wants_bias else None

        buffer = hidden.new_empty(chunk, len(weight))
        sums = hidden.new_zeros(3, dtype=precision)
        for start in range(0, len(labels), chunk):
            x, target = hidden[start : start + chunk], labels[start : start + chunk]
            product = buffer[: len(x)]  # [C, V]; becomes its own gradient
            if offset is None:
                torch.mm(x, head.T, out=product)
            else:
                torch.addmm(offset, x, head.T, out=product)
            wanted = wants_hidden or wants_weight or wants_bias
            sums += logits.sums(product, target, scratch, gradient=product if wanted else None)
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = _scaled(product @ head, factor)
            if grad_weight is not None:
                _add_product_(grad_weight, product.T, _scaled(x, factor))
            if grad_bias is not None:
                grad_bias += product.sum(0, dtype=precision) * factor

        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if bias is None or grad_bias is None else grad_bias.to(bias.dtype),
        )
        loss, correct, entropy = sums.unbind()
        ctx.mark_non_differentiable(correct, entropy)
        return loss / divisor, correct, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, *_):  # noqa: ANN001, ANN002, ANN205 # pyright: ignore[reportIncompatibleMethodOverride]
        return *(_times(saved, grad_output) for saved in ctx.saved_tensors), None, None, None, None


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, labels, divisor, logits: _Logits, chunk: int, head, vocabulary, *trained):  # noqa: ANN001, ANN002, ANN205
        wants_hidden = ctx.needs_input_grad[0]
        precision, scratch = _precision(hidden), _scratch(hidden, vocabulary, chunk)
        factor = logits.scale / divisor
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grads = [torch.zeros_like(parameter, dtype=precision) for parameter in trained]

        sums = hidden.new_zeros(3, dtype=precision)
        for start in range(0, len(labels), chunk):
            x, target = hidden[start : start + chunk], labels[start : start + chunk]
            with torch.enable_grad():
                x = x.detach().requires_grad_(wants_hidden)
                product = head(x)
            if not product.requires_grad:
                sums += logits.sums(product, target, scratch, gradient=None)
                continue
            gradient = torch.empty_like(product)
            sums += logits.sums(product.detach(), target, scratch, gradient=gradient)
            inputs = [x, *trained] if wants_hidden else trained
            found = list(torch.autograd.grad(product, inputs, gradient, allow_unused=True))
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = _scaled(found.pop(0), factor)
            for total, part in zip(grads, found, strict=True):
                if part is not None:  # an adapter that is switched off takes no part
                    total += part.to(total.dtype) * factor

        grads = [total.to(parameter.dtype) for total, parameter in zip(grads, trained, strict=True)]
        ctx.save_for_backward(grad_hidden, *grads)
        loss, correct, entropy = sums.unbind()
        ctx.mark_non_differentiable(correct, entropy)
        return loss / divisor, correct, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, *_):  # noqa: ANN001, ANN002, ANN205 # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, *grads = (_times(saved, grad_output) for saved in ctx.saved_tensors)
        return grad_hidden, None, None, None, None, None, None, *grads
