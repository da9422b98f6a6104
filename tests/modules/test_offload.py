"""Checkpoints in host memory: the gradients of plain checkpointing to the bit, and nothing read before it is there."""

from __future__ import annotations

import random
import weakref

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nbtune.modules.checkpointing import checkpoint_blocks
from nbtune.modules.offload import CudaLane, Transfer, offloaded_checkpoints

BLOCKS = 5


class SlowLane:
    """A stream on the CPU: copies run in order as late as they may (a seed: some before); until then there is NaN."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed) if seed is not None else None
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._begun = self._done = 0
        self.log: list[str] = []
        self.most_fetched = 0
        self._device_side: list[weakref.ref[Tensor]] = []

    def out(self, x: Tensor) -> Transfer:
        self.log.append("out")
        return self._begin(torch.full_like(x, torch.nan), x)

    def back(self, host: Tensor) -> Transfer:
        self.log.append("back")
        target = torch.full_like(host, torch.nan)
        self._device_side = [ref for ref in self._device_side if ref() is not None] + [weakref.ref(target)]
        self.most_fetched = max(self.most_fetched, len(self._device_side))
        return self._begin(target, host)

    def _begin(self, target: Tensor, source: Tensor) -> Transfer:
        self._pending.append((target, source))
        self._begun += 1
        number = self._begun
        if self._random is not None:
            self._run(self._random.randint(self._done, self._begun))
        return Transfer(target, source, lambda: self._run(number))

    def _run(self, number: int) -> None:
        while self._done < number:
            target, source = self._pending.pop(0)
            target.copy_(source)
            self._done += 1

    @property
    def idle(self) -> bool:
        return not self._pending


def model(seed: int = 0, device: str = "cpu") -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": BLOCKS}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=64, attention_dropout=0.1, **sizes)).to(device)
    llama.activation_checkpointing_enable({"use_reentrant": False})
    return llama.train()


def loss(llama: LlamaForCausalLM, seed: int = 0) -> Tensor:
    ids = torch.randint(64, (1, 40), generator=torch.Generator().manual_seed(seed)).to(llama.device)
    torch.manual_seed(seed)  # dropout
    return llama(input_ids=ids, labels=ids).loss


def gradients(llama: LlamaForCausalLM) -> list[Tensor]:
    found = [parameter.grad for parameter in llama.parameters() if parameter.grad is not None]
    assert len(found) == len(list(llama.parameters()))
    return [gradient.clone() for gradient in found]


def expected(seeds=(0,), model_seed: int = 0) -> list[Tensor]:
    llama = model(model_seed)
    for seed in seeds:
        loss(llama, seed).backward()
    return gradients(llama)


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_gradients_are_those_of_plain_checkpointing_however_late_the_copies_are(seed):
    llama, lane = model(), SlowLane(seed)
    with offloaded_checkpoints(llama, lane, min_bytes=0):
        loss(llama).backward()
    assert_same(gradients(llama), expected())
    assert lane.log == ["out"] * (BLOCKS - 1) + ["back"] * (BLOCKS - 1)
    assert lane.idle
    assert lane.most_fetched <= 2  # the one in use, and the next


def test_each_input_is_fetched_while_the_block_above_is_computed_again():
    llama, lane = model(), SlowLane()
    for number, block in enumerate(llama.model.layers):
        block.self_attn.register_forward_hook(lambda *_, number=number: lane.log.append(f"run {number}"))
    with offloaded_checkpoints(llama, lane, min_bytes=0):
        loss(llama).backward()
    again = lane.log[lane.log.index("back") :]
    # The last block's input stayed, so the first thing to come is the next one's; the first block's has none below it.
    wanted = [entry for number in reversed(range(1, BLOCKS)) for entry in ("back", f"run {number}")]
    assert again == [*wanted, "run 0"]


def test_small_inputs_stay():
    llama, lane = model(), SlowLane()
    with offloaded_checkpoints(llama, lane):
        loss(llama).backward()
    assert lane.log == []
    assert_same(gradients(llama), expected())


def test_blocks_that_are_not_checkpointed_are_left_alone():
    llama, lane = model(), SlowLane()
    with offloaded_checkpoints(llama, lane, min_bytes=0):
        checkpoint_blocks(llama, 2)  # as a run does that is short of memory
        loss(llama).backward()
    assert lane.log == ["out", "out", "back", "back"]
    assert_same(gradients(llama), expected())


def test_a_graph_that_is_kept_can_be_gone_through_again():
    llama, lane = model(), SlowLane()
    with offloaded_checkpoints(llama, lane, min_bytes=0):
        total = loss(llama)
        total.backward(retain_graph=True)
        first = gradients(llama)
        total.backward()
    assert_same(first, expected())
    assert_same(gradients(llama), [2 * gradient for gradient in first])


def test_two_passes_may_be_under_way_and_two_models():
    one, other, lanes = model(0), model(1), [SlowLane(), SlowLane()]
    with offloaded_checkpoints(one, lanes[0], 0), offloaded_checkpoints(other, lanes[1], 0):
        losses = [loss(one, 0), loss(other, 5), loss(one, 1)]
        for total in losses:
            total.backward()
    assert_same(gradients(one), expected((0, 1)))
    assert_same(gradients(other), expected((5,), model_seed=1))


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_step_that_fails_leaves_nothing_behind(when):
    llama, lane = model(), SlowLane()
    calls = []

    def fail(*_) -> None:
        calls.append(1)
        if len(calls) == (3 if when == "forward" else BLOCKS + 2):
            raise MemoryError

    with offloaded_checkpoints(llama, lane, min_bytes=0):
        handles = [block.mlp.register_forward_pre_hook(fail) for block in llama.model.layers]
        with pytest.raises(MemoryError):
            loss(llama).backward()
        assert len(calls) == (3 if when == "forward" else BLOCKS + 2)
        for handle in handles:
            handle.remove()
        llama.zero_grad()
        loss(llama).backward()
        assert lane.idle
    assert_same(gradients(llama), expected())
    assert not any("forward" in vars(block) for block in llama.model.layers)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_a_model_without_checkpointing_is_left_alone():
    llama = model()
    llama.activation_checkpointing_disable()
    lane = SlowLane()
    with offloaded_checkpoints(llama, lane, min_bytes=0):
        loss(llama).backward()
    assert lane.log == []


@pytest.mark.gpu
def test_on_a_gpu_gradients_are_the_same_and_the_inputs_are_gone():
    device = torch.device("cuda")
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, "num_hidden_layers": 16}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).to(device, torch.bfloat16).train()
    llama.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(64, (1, 8192), device=device)

    def step() -> tuple[list[Tensor], int]:
        llama.zero_grad()
        hidden = llama.model(input_ids=ids).last_hidden_state
        held = torch.cuda.memory_allocated()
        hidden.float().square().mean().backward()
        found = [parameter.grad.clone() for parameter in llama.model.parameters()]
        return found, held

    plain, held = step()
    with offloaded_checkpoints(llama, CudaLane(device)):
        for _ in range(3):
            offloaded, held_without = step()
            assert_same(offloaded, plain)
        pinned = torch.cuda.host_memory_stats()["allocated_bytes.peak"]
        step()
        assert torch.cuda.host_memory_stats()["allocated_bytes.peak"] == pinned  # buffers are used again
    one = ids.numel() * 512 * 2
    assert held - held_without > 12 * one
