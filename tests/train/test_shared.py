"""A pass for several runs: its gradients are those of each run alone, also where it has to be done in parts."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nbtune.fused import fused
from nbtune.fused.stretches import stretched
from nbtune.models.training import prepare_for_training
from nbtune.peft import LoraConfig, get_peft_model
from nbtune.train.loss import CausalLMLoss
from nbtune.train.member import OwnAdapter
from nbtune.train.shared import SharedBase

NAMES = ("a", "b", "c")
LENGTHS = {"a": [5, 9], "b": [7], "c": [3, 4, 6]}


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2)
    ).double()  # fmt: skip
    prepare_for_training(model)
    for number, name in enumerate(NAMES):
        get_peft_model(model, LoraConfig(r=2 + number, target_modules="all-linear", init_lora_weights=False,
                                         lora_dropout=0.2), name)  # fmt: skip
    return model.train()


def row(name: str) -> dict:
    lengths = LENGTHS[name]
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    ids = torch.randint(64, (1, sum(lengths)), generator=torch.Generator().manual_seed(len(lengths)))
    labels = ids.clone()
    labels[0, borders[:-1].long()] = -100
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "cu_seq_lens": borders,
            "max_length": max(lengths)}  # fmt: skip


def pass_of(model: LlamaForCausalLM, names, width: int) -> tuple[dict, dict, list[str]]:
    """Losses and gradients by adapter, and warnings, of one pass; each run draws from the seed of its name."""
    warnings: list[str] = []
    losses, gradients = {}, {}
    with stretched(model), fused(model):
        shared = SharedBase(CausalLMLoss(model), width, warnings.append)
        members = [shared.join(OwnAdapter(model, name), 0.0) for name in names]

        def run(member):
            member.begin()
            with torch.random.fork_rng([]):
                torch.manual_seed(ord(member.name))
                losses[member.name] = member(**row(member.name), num_items=10).loss.item()
            gradients[member.name] = {name: p.grad.clone() for name, p in member.named_parameters()}
            member.leave()

        threads = [threading.Thread(target=run, args=(member,)) for member in members]
        for thread in threads:
            thread.start()
        shared.conduct()
        for thread in threads:
            thread.join(60)
    return losses, gradients, warnings


def assert_alone(model: LlamaForCausalLM, losses: dict, gradients: dict) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    for name in NAMES:
        alone, wanted, _ = pass_of(model, [name], 1)
        assert losses[name] == pytest.approx(alone[name], rel=1e-12)
        assert wanted[name].keys() == gradients[name].keys()
        for key, gradient in gradients[name].items():
            torch.testing.assert_close(gradient, wanted[name][key], rtol=1e-9, atol=1e-12, msg=key)
            assert gradient.abs().max() > 0


def test_a_pass_for_three_is_each_alone():
    model = base()
    state = torch.get_rng_state()
    losses, gradients, warnings = pass_of(model, NAMES, 3)
    assert not warnings
    assert torch.equal(state, torch.get_rng_state())
    assert_alone(model, losses, gradients)


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_where_memory_runs_out_fewer_share_a_pass_and_no_gradient_is_spoiled(when):
    model = base()

    def too_much() -> None:
        torch.empty(2**60, dtype=torch.uint8)

    def hook(_block, _args, output):
        if output.shape[1] > 20:
            if when == "forward":
                too_much()
            output.register_hook(lambda _: too_much())

    handle = model.model.layers[0].register_forward_hook(hook)
    losses, gradients, warnings = pass_of(model, NAMES, 3)
    handle.remove()
    assert warnings == ["A pass holds one run from now on: memory ran out with 3."]
    assert_alone(model, losses, gradients)


def test_a_base_that_draws_random_numbers_is_not_shared_in_a_pass():
    model = base()
    model.model.layers[0].register_forward_hook(
        lambda block, _, output: torch.nn.functional.dropout(output, 0.1, block.training)
    )
    losses, gradients, warnings = pass_of(model, NAMES, 3)
    assert "random numbers" in warnings[0]
    assert_alone(model, losses, gradients)


def test_an_error_of_one_run_is_its_own():
    model = base()
    with stretched(model), fused(model):
        shared = SharedBase(CausalLMLoss(model), 3, lambda _: None)
        members = {name: shared.join(OwnAdapter(model, name), 0.0) for name in NAMES}
        ends: dict[str, object] = {}

        def run(name):
            members[name].begin()
            arguments = row(name)
            if name == "b":
                arguments["input_ids"] = arguments["input_ids"] + 1000  # no such words
            try:
                ends[name] = members[name](**arguments, num_items=10).loss.item()
            except IndexError as error:
                ends[name] = error
            members[name].leave()

        threads = [threading.Thread(target=run, args=(name,)) for name in NAMES]
        for thread in threads:
            thread.start()
        shared.conduct()
        for thread in threads:
            thread.join(60)
    assert isinstance(ends["b"], IndexError)
    assert shared.width == 3  # the others go on as before
    assert isinstance(ends["a"], float)
    assert isinstance(ends["c"], float)
