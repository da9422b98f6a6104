"""Sixty-four adapters on one model: what is done counts in Python calls, which no busy machine changes."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import llama

from nbtune.peft import LoraConfig, get_peft_model

CONFIG = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)


def calls(run: Callable[[], Any]) -> int:
    """The Python functions that are called, a measure of the work without a clock."""
    count = 0

    def count_one(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event == "call"

    gc.disable()  # what it calls is no work of ours
    sys.setprofile(count_one)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(llama(), CONFIG).save_pretrained(folder / "saved")
    return folder / "saved"


def test_switching_disabling_and_loading_cost_the_same_with_64_adapters(folder):
    model = get_peft_model(llama(num_hidden_layers=4), CONFIG, "a0")
    few = get_peft_model(llama(num_hidden_layers=1), CONFIG, "a0")
    few.add_adapter("a1", CONFIG)

    def disable(of: Any) -> None:
        with of.disable_adapter():
            pass

    adds = [calls(lambda n=n: model.add_adapter(f"a{n}", CONFIG)) for n in range(1, 64)]
    assert max(adds[1:]) <= 1.02 * min(adds[1:])
    assert calls(lambda: model.set_adapter("a63")) == calls(lambda: few.set_adapter("a1")) < 30
    assert calls(lambda: disable(model)) == calls(lambda: disable(few)) < 60


def test_the_64th_file_loads_like_the_second(folder):
    model = get_peft_model(llama(), CONFIG, "a0")
    loads = [calls(lambda n=n: model.load_adapter(folder, f"a{n}")) for n in range(1, 64)]
    assert max(loads[1:]) <= 1.02 * min(loads[1:])


def test_eight_adapters_in_a_batch_take_two_products_a_layer():
    """As many as one adapter: two batched products, however many adapters there are."""
    model = get_peft_model(llama(num_hidden_layers=1), CONFIG, "a0").eval()
    for number in range(1, 8):
        model.add_adapter(f"a{number}", CONFIG)
    ids = torch.randint(1, 96, (8, 5))
    products = {"aten::bmm", "aten::baddbmm", "aten::baddbmm_", "aten::addmm", "aten::addmm_"}
    counts = []
    for names in (["a0", "a1"] * 4, [f"a{number}" for number in range(8)]):
        with torch.no_grad(), torch.profiler.profile() as profile:
            model(input_ids=ids, adapter_names=names)
        counts.append({event.key: event.count for event in profile.key_averages() if event.key in products})
    assert counts[0] == counts[1]
    assert counts[1]["aten::baddbmm_"] == 7  # the linear layers of one block
