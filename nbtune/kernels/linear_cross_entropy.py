"""Linear layer and cross-entropy in one, without the logits.

The logits of a batch are its largest tensor (2,048 tokens of a 49,152-word vocabulary in fp32: 384 MiB, held two or
three times by the usual loss). Here rows without a label are dropped first, the rest go through the head in chunks, and
each chunk's gradient is made while its logits are still there, so that the backward pass only scales what is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
CHUNK_BYTES = 64 * 2**20  # fp32 logits of one chunk


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    num_items: int | Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T + bias` against `labels`.

    Args:
        hidden: Hidden states [N, D].
        weight: The output head [V, D].
        labels: Target of each row [N], already shifted; rows with -100 carry no loss.
        bias: Bias of the head [V].
        num_items: What the summed loss is divided by; None is the number of labelled rows.
        softcap: Gemma 2's `softcap * tanh(logits / softcap)` (arXiv:2408.00118), after `scale`.
        scale: Factor on the logits (Cohere's `logit_scale`, one over Granite's `logits_scaling`).
        chunk_bytes: Bound on the fp32 logits held at a time.

    Returns:
        The loss, an fp32 scalar; zero where no row has a label.
    """
    rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    hidden, labels = hidden[rows], labels[rows]
    divisor = max(len(rows), 1) if num_items is None else num_items
    chunk = max(1, chunk_bytes // (4 * weight.shape[0]))
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, divisor, softcap, scale, chunk)


def head_cross_entropy(
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    *,
    vocabulary: int,
    num_items: int | Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """`linear_cross_entropy` for a head that is more than a matrix, such as one with adapters.

    `head` maps hidden states [N, D] to logits [N, `vocabulary`]; the rest is as there. Each chunk of logits is made
    again in the backward pass, so that only one is held at a time.
    """
    rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    hidden, labels = hidden[rows], labels[rows]
    divisor = max(len(rows), 1) if num_items is None else num_items
    chunk = max(1, chunk_bytes // (4 * vocabulary))

    def loss_of(x: Tensor, target: Tensor) -> Tensor:
        logits = head(x).float() * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return cross_entropy(logits, target, reduction="sum")

    total = hidden.new_zeros((), dtype=torch.float32)
    for x, target in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        total = total + checkpoint(loss_of, x, target, use_reentrant=False)
    return total / divisor


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, divisor, softcap, scale, chunk):  # noqa: ANN001, ANN205
        needs = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        # Summed in fp32 over the chunks: in bf16 a sum of thousands of small terms stalls.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs[2] else None
        head = weight.to(hidden.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)

        for start in range(0, len(labels), chunk):
            x, target = hidden[start : start + chunk], labels[start : start + chunk, None]
            logits = (x @ head.T).float()  # [C, V]
            if bias is not None:
                logits += bias
            if scale != 1.0:
                logits *= scale
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            normaliser = logits.logsumexp(dim=1, keepdim=True)
            loss += (normaliser - logits.gather(1, target)).sum()
            if not any(needs[:3]):
                continue

            slope = 1 - (logits / softcap) ** 2 if softcap is not None else None
            grad = logits.sub_(normaliser).exp_()  # softmax, then softmax - one_hot = dloss/dlogits
            grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0))
            if slope is not None:
                grad *= slope
            grad *= scale / divisor
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, head, out=grad_hidden[start : start + chunk])
            if grad_weight is not None:
                grad_weight += grad.T @ x

        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if bias is None or grad_bias is None else grad_bias.to(bias.dtype),
        )
        return loss / divisor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):  # noqa: ANN001, ANN205 # pyright: ignore[reportIncompatibleMethodOverride]
        grads = (None if saved is None else saved * grad_output.to(saved.dtype) for saved in ctx.saved_tensors)
        return (*grads, None, None, None, None, None)
