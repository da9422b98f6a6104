"""The chunked loss against torch's own, in value and in gradient."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from nbtune.kernels.linear_cross_entropy import head_cross_entropy, linear_cross_entropy

N, D, V = 37, 16, 101


def inputs(dtype=torch.float64, masked=0.4):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=dtype)
    weight = torch.randn(V, D, generator=generator, dtype=dtype)
    bias = torch.randn(V, generator=generator, dtype=dtype)
    labels = torch.randint(V, (N,), generator=generator)
    labels[torch.rand(N, generator=generator) < masked] = -100
    return hidden, weight, bias, labels


def reference(hidden, weight, labels, bias=None, num_items=None, softcap=None, scale=1.0):
    logits = linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    total = cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return total / (num_items or (labels != -100).sum())


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"num_items": 50}, {"softcap": 3.0}, {"scale": 0.25}, {"softcap": 5.0, "scale": 2.0}]
)
def test_value_and_gradients_equal_autograd_in_fp64(options, with_bias):
    hidden, weight, bias, labels = inputs()
    chunk_bytes = 4 * V * 5  # five rows: several chunks, the last one partial
    ours = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    theirs = [t.clone().requires_grad_() for t in (hidden, weight, bias)]

    loss = linear_cross_entropy(
        ours[0], ours[1], labels, bias=ours[2] if with_bias else None, chunk_bytes=chunk_bytes, **options
    )
    expected = reference(theirs[0], theirs[1], labels, theirs[2] if with_bias else None, **options)
    loss.backward()
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(ours[: 2 + with_bias], theirs, strict=False):
        # the loss is computed in fp32 whatever the input, so fp32 is the precision to expect
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_frozen_head_gets_no_gradient():
    hidden, weight, _, labels = inputs(torch.float32)
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, labels).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_rows_without_label_do_not_count():
    hidden, weight, _, labels = inputs(torch.float32)
    kept = labels != -100
    whole = linear_cross_entropy(hidden, weight, labels)
    dropped = linear_cross_entropy(hidden[kept], weight, labels[kept])
    assert whole.item() == dropped.item()


def test_no_label_at_all_gives_zero_loss_and_gradient():
    hidden, weight, _, labels = inputs(torch.float32, masked=1.1)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.abs().max() == 0


def test_accumulated_parts_equal_the_whole():
    hidden, weight, _, labels = inputs(torch.float32)
    items = int((labels != -100).sum())
    parts = sum(
        linear_cross_entropy(hidden[s : s + 10], weight, labels[s : s + 10], num_items=items) for s in range(0, N, 10)
    )
    assert parts.item() == pytest.approx(linear_cross_entropy(hidden, weight, labels).item(), rel=1e-6)


def test_a_head_that_is_a_module_gives_the_same_loss_and_gradients():
    hidden, weight, bias, labels = inputs()
    head = torch.nn.Linear(D, V).double()
    head.load_state_dict({"weight": weight, "bias": bias})
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = head_cross_entropy(head, ours, labels, vocabulary=V, chunk_bytes=4 * V * 5, softcap=4.0, num_items=50)
    expected = linear_cross_entropy(theirs, weight, labels, bias=bias, softcap=4.0, num_items=50)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    assert head.weight.grad is not None
