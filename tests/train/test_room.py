"""Steps in which memory runs out, by real allocations that fail, against steps in which it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nbtune.data import Example, collate
from nbtune.data.packing import IGNORED, halves
from nbtune.errors import RunError
from nbtune.models.training import prepare_for_training
from nbtune.modules.checkpointing import checkpoint_blocks
from nbtune.peft import LoraConfig, get_peft_model
from nbtune.plan import Plan, format_bytes
from nbtune.spec import TrainingSpec
from nbtune.train.loop import train
from nbtune.train.loss import CausalLMLoss
from nbtune.train.memory import PeakMemory
from nbtune.train.room import Room, is_out_of_memory
from nbtune.train.schedule import Schedule

LAYERS = 5
TRAINING = TrainingSpec(
    max_steps=3, max_length=32, per_device_train_batch_size=4, gradient_accumulation_steps=1, learning_rate=1e-2,
    warmup_ratio=0.0, packing=True, eval_steps=0, save_steps=0,
)  # fmt: skip
PLAN = Plan(
    parts={"base weights": 10, "activations": 20}, tokens_per_step=128, seconds=None, available_bytes=100,
    micro_batch_size=4, accumulation=1, checkpointed_layers=0, layers=LAYERS, packing_length=128, trained_parameters=1,
    traced=True,
)  # fmt: skip


def tiny() -> LlamaForCausalLM:
    """In fp64, since Adam's first steps are of one size whatever a gradient's is, and would show fp32's rounding."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).double()  # fmt: skip
    prepare_for_training(model)
    return model


def examples(count: int = 60) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(64, (int(torch.randint(3, 20, (), generator=generator)),), generator=generator).int()
        labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.4, IGNORED, ids)
        made.append(Example(ids.numpy(), labels.numpy()))
    return made


def too_much() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def steps(folder, spoil: Callable[[LlamaForCausalLM], None], **room) -> tuple[list[float], list[str], dict]:
    """Losses, warnings and weights of three steps of a model that `spoil` has given a lack of memory."""
    model = tiny()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    spoil(model)
    events: list[dict] = []
    schedule = Schedule(examples(), TRAINING)
    cpu = torch.device("cpu")
    with PeakMemory(cpu) as memory:
        train(
            CausalLMLoss(model), adapted, schedule, [], TRAINING, checkpoints=folder, compute_dtype=torch.float64,
            memory=memory, room=Room(model, PLAN, **room), on_event=events.append, should_stop=lambda: False,
        )  # fmt: skip
    losses = [event["loss"] for event in events if event["type"] == "train"]
    warnings = [event["message"] for event in events if event["type"] == "warning"]
    return losses, warnings, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    losses, warnings, weights = steps(tmp_path_factory.mktemp("run"), lambda model: None)
    assert not warnings
    assert len(set(losses)) == 3
    return losses, weights


def in_the_last_block(allowed: Callable[[torch.nn.Module, int], bool]) -> Callable[[LlamaForCausalLM], None]:
    """Memory runs out there in the forward pass, unless the block and the number of tokens allow it."""

    def spoil(model):
        def hook(block, args):
            if torch.is_grad_enabled() and not allowed(block, args[0].shape[1]):
                too_much()

        model.model.layers[-1].register_forward_pre_hook(hook)

    return spoil


def test_blocks_are_computed_again_once_memory_runs_out(undisturbed, tmp_path):
    losses, warnings, weights = steps(tmp_path, in_the_last_block(lambda block, _: block.gradient_checkpointing))
    assert [text.split(": ")[1].split(" layers")[0] for text in warnings] == ["3 of 5", "5 of 5"]
    assert all("step 1, which is done again" in text for text in warnings)
    assert losses == undisturbed[0]
    for name, weight in weights.items():
        torch.testing.assert_close(weight, undisturbed[1][name], rtol=0, atol=0)


def test_micro_batches_are_halved_once_all_blocks_are(undisturbed, tmp_path):
    losses, warnings, weights = steps(tmp_path, in_the_last_block(lambda _, tokens: tokens <= 40))
    assert len(warnings) >= 4
    assert "5 of 5 layers" in warnings[1]
    assert "micro-batches have at most" in warnings[-1]
    assert losses == pytest.approx(undisturbed[0], rel=1e-10)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, undisturbed[1][name], rtol=1e-6, atol=1e-9)


def test_blocks_that_must_not_be_computed_again_are_not(undisturbed, tmp_path):
    spoil = in_the_last_block(lambda block, tokens: not block.gradient_checkpointing and tokens <= 70)
    losses, warnings, _ = steps(tmp_path, spoil, may_recompute=False)
    assert all("micro-batches" in text for text in warnings)
    assert losses == pytest.approx(undisturbed[0], rel=1e-10)


def test_memory_that_runs_out_in_the_backward_pass_spoils_no_gradient(undisturbed, tmp_path):
    """Gradients of the last blocks are there by then."""
    left = [1]

    def spoil(model):
        def when_backward(_gradient):
            if left:
                left.pop()
                too_much()

        def hook(_block, _args, output):
            if torch.is_grad_enabled():
                output.register_hook(when_backward)

        model.model.layers[1].register_forward_hook(hook)

    losses, warnings, weights = steps(tmp_path, spoil)
    assert len(warnings) == 1
    assert losses == undisturbed[0]
    for name, weight in weights.items():
        torch.testing.assert_close(weight, undisturbed[1][name], rtol=0, atol=0)


def test_where_one_example_is_too_much_the_largest_part_and_a_remedy_are_named(tmp_path):
    with pytest.raises(RunError) as error:
        steps(tmp_path, in_the_last_block(lambda *_: False))
    assert "What grew is activations and overhead" in error.value.message
    model = tiny()
    get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert f"base weights {format_bytes(weights)}, planned 10 B" in error.value.message
    assert "MB, planned 20 B" in error.value.message or "GB, planned 20 B" in error.value.message
    assert "Lower max_length" in error.value.remedy


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path):
    def spoil(model):
        model.model.layers[0].register_forward_pre_hook(lambda *_: torch.zeros(2) @ torch.zeros(3))

    with pytest.raises(RuntimeError, match="size"):
        steps(tmp_path, spoil)
    with pytest.raises(RuntimeError) as error:
        too_much()
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator"))


def test_halves_have_the_examples_of_the_whole():
    made = examples(7)
    whole = collate([made[:3], made[3:]])
    first, second = halves(whole)
    count = len(first.cu_seq_lens) - 1
    for half, part in ((first, made[:count]), (second, made[count:])):
        expected = collate([part])
        for name in ("input_ids", "labels", "position_ids", "cu_seq_lens"):
            assert torch.equal(getattr(half, name), getattr(expected, name)), name
        assert half.max_length == expected.max_length
    assert abs(first.tokens - second.tokens) <= whole.max_length
    with pytest.raises(ValueError, match="one example"):
        halves(collate([made[:1]]))


@pytest.mark.parametrize("count", range(LAYERS + 1))
def test_gradients_do_not_depend_on_the_number_of_recomputed_blocks(count):
    batch = collate([examples(5)])

    def gradients(checkpointed):
        model = tiny().train()
        checkpoint_blocks(model, checkpointed)
        assert [block.gradient_checkpointing for block in model.model.layers] == [
            number < checkpointed for number in range(LAYERS)
        ]
        CausalLMLoss(model)(
            batch.input_ids, batch.labels, batch.position_ids, batch.cu_seq_lens, batch.max_length
        ).loss.backward()  # fmt: skip
        return {name: p.grad for name, p in model.named_parameters()}

    expected = gradients(0)
    for name, gradient in gradients(count).items():
        assert torch.equal(gradient, expected[name]), name
