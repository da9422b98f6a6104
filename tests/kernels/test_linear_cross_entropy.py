"""The chunked loss against torch's own and transformers', in value and in gradient; what it allocates."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_pt_utils import LabelSmoother

from nbtune.kernels import linear_cross_entropy as kernel
from nbtune.kernels.linear_cross_entropy import head_cross_entropy, linear_cross_entropy

N, D, V = 37, 16, 101
CHUNK = 4 * V * 5  # five rows: several chunks, the last one partial
OPTIONS = [
    {},
    {"num_items": 50},
    {"num_items": torch.tensor(50)},
    {"softcap": 3.0},
    {"scale": 0.25},
    {"label_smoothing": 0.1},
    {"softcap": 5.0, "scale": 2.0, "label_smoothing": 0.2, "num_items": 50},
]


def inputs(dtype=torch.float64, masked=0.4, rows=N, vocabulary=V):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, D, generator=generator, dtype=dtype)
    weight = torch.randn(vocabulary, D, generator=generator, dtype=dtype)
    bias = torch.randn(vocabulary, generator=generator, dtype=dtype)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < masked] = -100
    return hidden, weight, bias, labels


def logits_of(hidden, weight, bias=None, softcap=None, scale=1.0):
    logits = linear(hidden, weight, bias) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def reference(hidden, weight, labels, bias=None, num_items=None, label_smoothing=0.0, **options):
    logits = logits_of(hidden, weight, bias, **options)
    total = cross_entropy(logits, labels, ignore_index=-100, reduction="sum", label_smoothing=label_smoothing)
    return total / ((labels != -100).sum() if num_items is None else num_items)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_value_and_gradients_equal_autograd_in_fp64(options, with_bias):
    hidden, weight, bias, labels = inputs()
    ours = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    theirs = [t.clone().requires_grad_() for t in (hidden, weight, bias)]

    loss = linear_cross_entropy(
        ours[0], ours[1], labels, bias=ours[2] if with_bias else None, chunk_bytes=CHUNK, **options
    ).loss
    expected = reference(theirs[0], theirs[1], labels, theirs[2] if with_bias else None, **options)
    (3 * loss).backward()
    (3 * expected).backward()

    torch.testing.assert_close(loss, expected)
    for a, b in zip(ours[: 2 + with_bias], theirs, strict=False):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("num_items", [None, 200, torch.tensor(200)])
@pytest.mark.parametrize("vocabulary", [1000, 1024])  # without and with columns in groups
def test_equals_transformers_loss_in_fp32(vocabulary, num_items):
    hidden, weight, _, labels = inputs(torch.float32, rows=150, vocabulary=vocabulary)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = linear_cross_entropy(ours, weight, labels, num_items=num_items, chunk_bytes=4 * vocabulary * 40).loss
    expected = ForCausalLMLoss(linear(theirs, weight)[None], None, vocabulary, num_items, shift_labels=labels[None])
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5 * theirs.grad.abs().max().item())


@pytest.mark.parametrize("num_items", [None, 200])
def test_label_smoothing_is_that_of_transformers(num_items):
    hidden, weight, _, labels = inputs(torch.float32)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = linear_cross_entropy(ours, weight, labels, num_items=num_items, label_smoothing=0.1).loss
    smoother = LabelSmoother(epsilon=0.1)
    expected = smoother({"logits": linear(theirs, weight)}, labels, num_items_in_batch=num_items)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 0.5}, {"label_smoothing": 0.3}])
@pytest.mark.parametrize("vocabulary", [V, 1024, 96])
def test_accuracy_and_entropy_equal_the_naive_formulas(vocabulary, options):
    hidden, weight, _, labels = inputs(vocabulary=vocabulary)
    shape = {name: value for name, value in options.items() if name != "label_smoothing"}
    logits = logits_of(hidden, weight, **shape)
    labels[::3] = torch.where(labels[::3] == -100, -100, logits.argmax(1)[::3])  # right now and then
    found = linear_cross_entropy(hidden, weight, labels, chunk_bytes=4 * vocabulary * 5, **options)

    kept = labels != -100
    probabilities = logits.softmax(1)
    entropies = -(probabilities * probabilities.log()).sum(1)
    right = ((logits.argmax(1) == labels) & kept).sum()
    assert 0 < right < kept.sum()
    assert found.correct == right
    torch.testing.assert_close(found.entropy, entropies[kept].sum())
    assert not found.correct.requires_grad
    assert not found.entropy.requires_grad


@pytest.mark.parametrize("vocabulary", [101, 512])
def test_of_equal_largest_logits_the_first_counts_as_argmax_has_it(vocabulary):
    weight = torch.zeros(vocabulary, 1)
    weight[[40, 70, 100]] = 1.0
    labels = torch.tensor([40, 70, 100, 3])
    assert linear_cross_entropy(torch.ones(4, 1), weight, labels).correct == 1


def test_losses_that_fp32_exponentials_cannot_hold_are_right():
    hidden, weight, _, labels = inputs(torch.float32)
    hidden = 200 * hidden
    expected = reference(hidden.double(), weight.double(), labels)
    loss = linear_cross_entropy(hidden, weight, labels).loss
    assert expected > 500
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_bf16_is_as_near_to_fp64_as_transformers_loss():
    hidden, weight, _, labels = (t.bfloat16() if t.is_floating_point() else t for t in inputs(rows=600))
    exact = hidden.double().requires_grad_()
    reference(exact, weight.double(), labels).backward()
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    linear_cross_entropy(ours, weight, labels).loss.backward()
    ForCausalLMLoss(linear(theirs, weight)[None], None, V, shift_labels=labels[None]).backward()
    errors = [(leaf.grad.double() - exact.grad).norm() / exact.grad.norm() for leaf in (ours, theirs)]
    assert errors[0] < 1.3 * errors[1]  # one more rounding, of the division by the number of tokens


def test_bf16_head_sums_its_gradient_in_fp32():
    hidden, weight, _, labels = (t.bfloat16() if t.is_floating_point() else t for t in inputs(rows=600))
    exact = weight.double().requires_grad_()
    reference(hidden.double(), exact, labels).backward()
    weight.requires_grad_()
    linear_cross_entropy(hidden, weight, labels, chunk_bytes=4 * V * 2).loss.backward()
    assert (weight.grad.double() - exact.grad).norm() < 0.01 * exact.grad.norm()


def test_frozen_head_gets_no_gradient():
    hidden, weight, _, labels = inputs(torch.float32)
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, labels).loss.backward()
    assert hidden.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("chunk_rows", [1, 2, 7, 1000])
def test_chunks_and_blocks_of_any_size_give_the_same(chunk_rows, monkeypatch):
    hidden, weight, _, labels = inputs()
    whole, parts = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    expected = linear_cross_entropy(whole, weight, labels)
    expected.loss.backward()
    monkeypatch.setattr(kernel, "BLOCK_BYTES", 8 * V * 3)  # blocks of three rows
    found = linear_cross_entropy(parts, weight, labels, chunk_bytes=4 * V * chunk_rows)
    found.loss.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(parts.grad, whole.grad)


def test_rows_without_label_do_not_count():
    hidden, weight, _, labels = inputs(torch.float32)
    kept = labels != -100
    whole = linear_cross_entropy(hidden, weight, labels)
    dropped = linear_cross_entropy(hidden[kept], weight, labels[kept])
    assert whole == dropped


@pytest.mark.parametrize("num_items", [None, 10])
def test_no_label_at_all_gives_zero_loss_and_gradient(num_items):
    hidden, weight, _, labels = inputs(torch.float32, masked=1.1)
    hidden.requires_grad_()
    weight.requires_grad_()
    found = linear_cross_entropy(hidden, weight, labels, num_items=num_items)
    found.loss.backward()
    assert found == (0, 0, 0)
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


def test_accumulated_parts_equal_the_whole():
    hidden, weight, _, labels = inputs(torch.float32)
    items = int((labels != -100).sum())
    parts = [
        torch.stack(linear_cross_entropy(hidden[s : s + 10], weight, labels[s : s + 10], num_items=items))
        for s in range(0, N, 10)
    ]
    torch.testing.assert_close(sum(parts), torch.stack(linear_cross_entropy(hidden, weight, labels)))


def test_backward_twice_gives_the_same():
    hidden, weight, _, labels = inputs()
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels).loss
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * first)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_head_that_is_a_module_gives_the_same_loss_and_gradients(options):
    hidden, weight, bias, labels = inputs()
    head = torch.nn.Linear(D, V).double()
    head.load_state_dict({"weight": weight, "bias": bias})
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    ours = hidden.clone().requires_grad_()
    found = head_cross_entropy(head, ours, labels, vocabulary=V, chunk_bytes=CHUNK, **options)
    expected = linear_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2], **options)
    (2 * found.loss).backward()
    (2 * expected.loss).backward()
    torch.testing.assert_close(found, expected)
    for a, b in zip((ours, head.weight, head.bias), leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_frozen_module_and_one_without_gradients():
    hidden, weight, _, labels = inputs()
    head = torch.nn.Linear(D, V, bias=False).double().requires_grad_(False)
    head.load_state_dict({"weight": weight})
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    head_cross_entropy(head, ours, labels, vocabulary=V, chunk_bytes=CHUNK).loss.backward()
    expected = linear_cross_entropy(theirs, weight, labels)
    expected.loss.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    with torch.no_grad():
        torch.testing.assert_close(head_cross_entropy(head, hidden, labels, vocabulary=V), expected)


class Allocations(TorchDispatchMode):
    """The largest tensor made, and how often the host had to wait for a value."""

    def __init__(self):
        super().__init__()
        self.largest = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **kwargs or {})
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        self.waits += func in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default)
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("as_module", [False, True])
def test_no_tensor_is_larger_than_the_budget_and_the_host_waits_once(dtype, as_module):
    rows, vocabulary = 600, 4096
    hidden, weight, _, labels = inputs(dtype, rows=rows, vocabulary=vocabulary)
    hidden.requires_grad_()
    head = torch.nn.Linear(D, vocabulary, bias=False, dtype=dtype).requires_grad_(False)
    budget = 2**20  # 64 rows, where all in fp32 are 5.6 MiB
    with Allocations() as made:
        if as_module:
            loss = head_cross_entropy(head, hidden, labels, vocabulary=vocabulary, chunk_bytes=budget).loss
        else:
            loss = linear_cross_entropy(hidden, weight, labels, chunk_bytes=budget).loss
    waits = made.waits
    with made:
        loss.backward()
    assert 0.25 * budget < made.largest <= budget
    assert waits == 1
