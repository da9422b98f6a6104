"""Merging computes the same; unmerging restores the base bit for bit."""

from __future__ import annotations

import pytest
import torch
from grid import disturb
from tiny_models import llama, logits
from transformers import LlamaForCausalLM

from nbtune.errors import AdapterError
from nbtune.peft import BeftConfig, HiraConfig, LoraConfig, get_peft_model

RANDOM = LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.fixture
def two(base):
    model = get_peft_model(base, RANDOM, "a")
    model.add_adapter("b", LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "lm_head"]))
    return model.eval()


@pytest.mark.parametrize("active", ["a", "b", ["a", "b"]])
def test_merged_equals_unmerged(two, ids, active):
    two.set_adapter(active)
    expected = logits(two, ids)
    two.merge_adapter()
    close(logits(two, ids), expected)
    two.unmerge_adapter()
    assert torch.equal(logits(two, ids), expected)


def test_merging_one_of_the_active_adapters_leaves_the_other_on(two, ids):
    two.set_adapter(["a", "b"])
    expected = logits(two, ids)
    two.merge_adapter(["b"])
    close(logits(two, ids), expected)
    two.merge_adapter(["a"])
    two.merge_adapter(["a"])  # merged already: nothing happens
    close(logits(two, ids), expected)


def test_ten_cycles_in_bfloat16_leave_every_bit_where_it_was(base):
    base.to(torch.bfloat16)
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    model = get_peft_model(base, RANDOM)
    changed = 0
    for _ in range(10):
        model.merge_adapter()
        changed += not torch.equal(base.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])
        model.unmerge_adapter()
    assert changed == 10
    after = dict(model.unload().named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_merged_weight_is_rounded_once(base):
    base.to(torch.bfloat16)
    model = get_peft_model(base, RANDOM, "a")
    model.add_adapter("b", RANDOM)
    layer = base.model.layers[0].mlp.up_proj
    exact = layer.weight.double() + sum(
        adapter.delta_weight(layer.base_layer).double() for adapter in layer.adapters.values()
    )
    model.merge_adapter(["a"])
    model.merge_adapter(["b"])
    torch.testing.assert_close(layer.weight.double(), exact.bfloat16().double(), atol=0, rtol=2**-8)
    assert (layer.weight.double() - exact).abs().max() <= exact.abs().max() * 2**-8


def test_disabling_while_merged_is_the_base_and_comes_back(two, make, ids):
    two.merge_adapter()
    merged = logits(two, ids)
    with two.disable_adapter():
        assert torch.equal(logits(two, ids), logits(make(), ids))
    assert torch.equal(logits(two, ids), merged)
    assert two.get_base_model().model.layers[0].mlp.up_proj._original


def test_a_merged_adapter_cannot_be_switched_off_changed_or_deleted(two):
    two.merge_adapter()
    refused = [
        lambda: two.set_adapter("b"),
        lambda: two.delete_adapter("a"),
        lambda: two.add_adapter("c", RANDOM),
        lambda: two(input_ids=torch.ones(1, 2, dtype=torch.long), adapter_names=["b"]),
    ]
    for call in refused:
        with pytest.raises(AdapterError, match=r"Call unmerge_adapter first"):
            call()
    two.set_adapter(["a", "b"])  # a stays on


def test_a_broken_adapter_is_not_merged_and_the_base_stays(two, make, ids):
    layer = two.get_base_model().model.layers[2].mlp.down_proj
    layer.adapters["a"].lora_B.data[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="inf or nan"):
        two.merge_adapter()
    assert two._state.merged == ()
    with two.disable_adapter():
        assert torch.equal(logits(two, ids), logits(make(), ids))


def test_merge_and_unload_is_a_plain_model(two, make, ids, tmp_path):
    two.set_adapter(["a", "b"])
    expected = logits(two, ids)
    plain = two.merge_and_unload()
    assert type(plain) is LlamaForCausalLM
    assert [type(module) for module in plain.modules()] == [type(module) for module in make().modules()]
    assert plain.state_dict().keys() == make().state_dict().keys()
    close(logits(plain, ids), expected)
    plain.save_pretrained(tmp_path)
    close(logits(LlamaForCausalLM.from_pretrained(tmp_path), ids), expected)


def test_one_named_adapter_is_merged_for_good(two, ids):
    two.set_adapter("b")
    b = logits(two, ids)
    two.set_adapter("a")
    close(logits(two.merge_and_unload(adapter_names=["b"]), ids), b)


def test_a_tied_embedding_does_not_change_with_the_head(ids, tmp_path):
    """PEFT adds the update to the one tensor that head and embedding share, which then computes something else."""
    base = llama(tie_word_embeddings=True)
    embedding = base.get_input_embeddings().weight
    before = embedding.detach().clone()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)).eval()
    expected = logits(model, ids)
    model.merge_adapter()
    close(logits(model, ids), expected)
    assert torch.equal(embedding, before)
    model.unmerge_adapter()
    assert base.get_output_embeddings().weight is embedding  # tied again
    with pytest.warns(UserWarning, match="no longer tied"):
        plain = model.merge_and_unload()
    plain.save_pretrained(tmp_path)
    close(logits(LlamaForCausalLM.from_pretrained(tmp_path), ids), expected)


def test_a_model_moved_while_merged_unmerges_in_its_new_precision(two, base, make):
    two.merge_adapter()
    two.to(torch.float64)
    two.unmerge_adapter()
    weight = base.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.float64
    assert torch.equal(weight.float(), make().model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize(
    "config", [LoraConfig(r=4, use_dora=True), HiraConfig(r=4), BeftConfig(), LoraConfig(bias="all")]
)
def test_an_adapter_beside_a_merged_one_starts_from_the_base(make, ids, config):
    """Its equation has the base weight in it, which is not the merged one."""
    config = config.replace(target_modules=["query", "dense"])
    model = get_peft_model(make("bert"), config, "a").eval()
    model.add_adapter("b", config)
    disturb(model, 0.2)
    model.set_adapter(["a", "b"])
    together = logits(model, ids)
    model.merge_adapter(["a"])
    close(logits(model, ids), together)
    model.merge_adapter(["b"])
    close(logits(model, ids), together)
