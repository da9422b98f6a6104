"""Another adapter per row of a batch, and modules trained whole (`modules_to_save`)."""

from __future__ import annotations

import pytest
import torch
from tiny_models import logits
from torch import nn

from nbtune.errors import AdapterError
from nbtune.peft import LoraConfig, get_peft_model

ROWS = ["b", "__base__", "a", "c", "b"]


@pytest.fixture
def ids():
    return torch.randint(1, 96, (5, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(base):
    """Three adapters on different modules; `c` has a head of its own."""
    model = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"), "a").eval()
    model.add_adapter("b", LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    model.add_adapter("c", LoraConfig(target_modules=["v_proj"], modules_to_save=["lm_head"], init_lora_weights=False))
    with torch.no_grad():
        base.lm_head.adapters["c"].module.weight.mul_(1.5)
    return model


def one_by_one(model, ids, names):
    parts = []
    for row, name in zip(ids, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                parts.append(logits(model, row[None]))
        else:
            model.set_adapter(name)
            parts.append(logits(model, row[None]))
    model.set_adapter("a")
    return torch.cat(parts)


def test_each_row_gets_its_adapter(model, ids):
    expected = one_by_one(model, ids, ROWS)
    torch.testing.assert_close(logits(model, ids, adapter_names=ROWS), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(model, ids), one_by_one(model, ids, ["a"] * 5), atol=1e-5, rtol=0)  # only then


def test_rows_are_trained_by_their_own_loss(model, ids):
    """The gradient of a mixed batch is that of the rows with that adapter, alone."""
    weights = torch.randn(5, 7, 96, generator=torch.Generator().manual_seed(2))
    (model(input_ids=ids, adapter_names=ROWS).logits * weights).sum().backward()
    mixed = {name: p.grad.clone() for name, p in model.named_parameters() if ".adapters.b." in name}
    model.zero_grad()
    model.set_adapter("b")
    (model(input_ids=ids[[0, 4]]).logits * weights[[0, 4]]).sum().backward()
    assert len(mixed) == 6
    for name, gradient in mixed.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_generation_with_an_adapter_per_row(model, ids, options):
    options = {**options, "max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    mixed = model.generate(input_ids=ids[:3], adapter_names=["a", "b", "__base__"], **options)
    for row, name in enumerate(["a", "b"]):
        model.set_adapter(name)
        assert torch.equal(mixed[row], model.generate(input_ids=ids[row : row + 1], **options)[0])
    with model.disable_adapter():
        assert torch.equal(mixed[2], model.generate(input_ids=ids[2:3], **options)[0])


def test_wrong_rows_are_refused(model, ids):
    with pytest.raises(AdapterError, match="no adapter 'z'"):
        model(input_ids=ids, adapter_names=["z"] * 5)
    with pytest.raises(AdapterError, match=r"has 3 names, but model.*q_proj got an input of shape"):
        model(input_ids=ids, adapter_names=["a"] * 3)
    with pytest.raises(AdapterError, match="Give a list"):
        model(input_ids=ids, adapter_names="a")
    with pytest.raises(AdapterError, match="Give a list"):
        model(input_ids=ids, adapter_names=[])
    assert model._state.rows is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_run_again_with_their_rows(model, ids, reentrant):
    """The backward pass recomputes two forwards with other rows than the last, and without rows at all."""
    weights = torch.randn(5, 7, 96, generator=torch.Generator().manual_seed(2))

    def gradients():
        model.zero_grad()
        losses = [(model(input_ids=ids, adapter_names=rows).logits * weights).sum() for rows in (ROWS, ROWS[::-1])]
        sum(losses).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.train()
    model.enable_input_require_grads()
    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    again = gradients()
    assert expected.keys() == again.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(again[name], gradient)


def test_an_expert_among_others_does_not_know_its_rows():
    """A [tokens, in] input of an expert does not say which row a token is from; guessing would be silently wrong."""
    block = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)]), "pooler": nn.Linear(4, 4)})
    base = nn.ModuleDict({"layers": nn.ModuleList([block])})
    model = get_peft_model(base, LoraConfig(target_modules=["experts.0", "pooler"], init_lora_weights=False), "a")
    x = torch.randn(2, 4)
    with model._rows(["a", "__base__"]):
        with pytest.raises(AdapterError, match=r"experts.0 got an input of shape \(2, 4\)"):
            block["experts"][0](x)
        mixed = block["pooler"](x)
    torch.testing.assert_close(mixed[0], block["pooler"](x)[0])
    assert torch.equal(mixed[1], block["pooler"].base_layer(x)[1])


def test_a_saved_module_is_trained_instead_of_the_base(base, ids):
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "model.norm"]))
    before = base.lm_head.base_layer.weight.detach().clone()
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert base.lm_head.adapters["default"].module.weight.grad is not None
    assert torch.equal(base.lm_head.base_layer.weight, before)
    assert not torch.equal(base.lm_head.adapters["default"].module.weight, before)


def test_saved_modules_switch_disable_and_merge_like_any_adapter(model, base, make, ids):
    model.set_adapter("c")
    c = logits(model, ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(make(), ids))
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), c, atol=1e-5, rtol=0)
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), c)
    plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain, ids), c, atol=1e-5, rtol=0)
    assert plain.state_dict().keys() == make().state_dict().keys()
