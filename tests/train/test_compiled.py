"""Compiled blocks: the losses of eager ones for rows of any length, and a break-even that adds up."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from nbtune.models.training import prepare_for_training
from nbtune.peft import LoraConfig, get_peft_model
from nbtune.train import compiled
from nbtune.train.compiled import compile_and_time, compile_blocks
from nbtune.train.loss import CausalLMLoss

LENGTHS = [(40, 30), (33, 20, 11), (64,), (5, 6, 7, 8, 9)]  # of the segments of a row


def lora_llama() -> CausalLMLoss:
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, **sizes))
    prepare_for_training(llama)
    get_peft_model(llama, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return CausalLMLoss(llama).train()


def row(lengths: tuple[int, ...]) -> dict:
    borders = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    ids = torch.randint(256, (1, sum(lengths)), generator=torch.Generator().manual_seed(len(lengths)))
    labels = ids.clone()
    labels[0, borders[:-1].long()] = -100
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {
        "input_ids": ids, "labels": labels, "position_ids": positions, "cu_seq_lens": borders,
        "max_length": max(lengths),
    }  # fmt: skip


def passes(model: CausalLMLoss, lengths: tuple[int, ...]) -> tuple[float, list[torch.Tensor]]:
    loss = model(**row(lengths)).loss
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return loss.item(), gradients


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_eager_blocks_and_rows_of_other_lengths_share_their_graphs():
    torch._dynamo.reset()  # of what other tests have compiled
    counters.clear()
    model = lora_llama()
    keys = list(model.state_dict())
    eager = [passes(model, lengths) for lengths in LENGTHS]
    model.eval()
    with torch.no_grad():
        held_out = model(**row(LENGTHS[0])).loss
    model.train()

    event = compile_and_time(model.model, lambda: passes(model, LENGTHS[0]), work_per_step=3, steps=10)
    assert event["type"] == "compile"
    assert event["compile_seconds"] > 0
    assert counters["frames"]["ok"] > 0
    graphs = [counters["stats"]["unique_graphs"]]
    assert graphs[0] > 0
    for lengths, (loss, gradients) in zip(LENGTHS, eager, strict=True):
        found, others = passes(model, lengths)
        assert found == pytest.approx(loss, rel=1e-5)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients, others, strict=True))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] - graphs[0] <= 1  # a number that was the same so far may still become symbolic
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**row(LENGTHS[0])).loss, held_out)  # evaluation is not compiled
    assert counters["stats"]["unique_graphs"] == graphs[-1]
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("before", "first", "after", "wanted"),
    [(2.0, 31.0, 1.0, 30), (1.0, 31.0, 1.0, None), (1.0, 5.0, 2.0, None), (2.0, 1.6, 1.5, 1)],
)
def test_break_even_is_the_compilation_over_what_a_step_saves(monkeypatch, before, first, after, wanted):
    clock = [0.0]
    durations = iter([9.0, before, before + 1, first, after, after + 1])

    def work() -> None:
        clock[0] += next(durations)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(compiled, "compile_blocks", lambda model: None)
    event = compile_and_time(lora_llama().model, work, work_per_step=1, steps=20)
    assert event["break_even_steps"] == wanted
    assert event["compile_seconds"] == pytest.approx(first - after)
    assert (event["step_seconds_before"], event["step_seconds_after"]) == pytest.approx((before, after))
    assert ("never pays" in event["message"]) == (wanted is None)
    assert ("there are 20" in event["message"]) == (wanted == 30)
    assert wanted is None or wanted == max(1, math.ceil((first - after) / (before - after)))


def test_checkpointed_blocks_run_as_they_are():
    model = lora_llama()
    wanted = passes(model, LENGTHS[0])
    model.model.activation_checkpointing_enable({"use_reentrant": False})
    compile_blocks(model.model)
    loss, gradients = passes(model, LENGTHS[0])
    assert loss == wanted[0]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, wanted[1], strict=True))


@pytest.mark.slow
def test_a_compiler_that_fails_is_named():
    code = """
import sys
sys.path.insert(0, "tests/train")
from test_compiled import LENGTHS, compile_and_time, lora_llama, passes
from nbtune.errors import NbtuneError
model = lora_llama()
try:
    compile_and_time(model.model, lambda: passes(model, LENGTHS[0]), 1, 1)
except NbtuneError as error:
    print(error)
"""
    there_is_none = os.environ | {"CXX": "/no/such/compiler", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=there_is_none, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("The model's blocks cannot be compiled\n"), done.stdout
    assert "torch_compile to false" in done.stdout
