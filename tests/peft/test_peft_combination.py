"""Weighted combinations, hot swaps, states, calibrated first weights: what is done with adapters as wholes."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import torch
from grid import close, disturb
from tiny_models import llama, logits, quantised_and_plain

from nbtune.errors import AdapterError
from nbtune.peft import (
    HRAConfig,
    LoraConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
    initialize_lora_eva_weights,
    inject_adapter_in_model,
    replace_lora_weights_loftq,
)

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture
def pair(make, tmp_path):
    """The same two LoRAs here and in peft."""
    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False), "a")
    theirs.add_adapter("b", peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "both")
    ours = PeftModel.from_pretrained(make(), tmp_path / "both" / "a", "a")
    ours.load_adapter(tmp_path / "both" / "b", "b")
    return ours.eval(), theirs.eval()


TYPES = {
    "linear": {},
    "cat": {},
    "svd": {"svd_rank": 5},
    "ties": {"density": 0.6},
    "magnitude_prune": {"density": 0.6},
    "ties_svd": {"density": 0.6},
    "magnitude_prune_svd": {"density": 0.6, "svd_rank": 3},
}


@pytest.mark.parametrize("kind", TYPES)
def test_a_weighted_combination_is_that_of_peft(pair, ids, tmp_path, make, kind):
    ours, theirs = pair
    ours.add_weighted_adapter(["a", "b"], [0.7, -0.4], "new", kind, **TYPES[kind])
    theirs.base_model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "new", kind, **TYPES[kind])
    before = logits(ours, ids)
    ours.set_adapter("new")
    theirs.set_adapter("new")
    close(logits(ours, ids), logits(theirs, ids), atol=2e-5)
    assert (logits(ours, ids) - before).abs().max() > 1e-2
    ours.save_pretrained(tmp_path / "new", selected_adapters=["new"])
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "new" / "new").eval()
    close(logits(again, ids), logits(ours, ids))


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_keeps_about_its_density_and_repeats_with_its_seed(pair, ids, kind):
    ours, _ = pair
    for name in ("new", "again"):
        torch.manual_seed(3)
        ours.add_weighted_adapter(["a", "b"], [0.7, 0.4], name, kind, density=0.5)
    ours.set_adapter("new")
    once = logits(ours, ids)
    ours.set_adapter("again")
    assert torch.equal(logits(ours, ids), once)


def test_what_cannot_be_combined_is_refused_and_nothing_is_added(pair, make):
    ours, _ = pair
    ours.add_adapter("c", LoraConfig(target_modules=TARGETS, modules_to_save=["lm_head"]))
    ours.add_adapter("d", HRAConfig(target_modules=TARGETS, r=2))
    for names, kind, message in [
        (["a", "c"], "cat", "lm_head has a trained module"),
        (["a", "d"], "cat", "of 2 methods: HRA, LORA"),
        (["d"], "cat", "HRA has no weighted combinations"),
        (["a", "b"], "blend", "blend"),
        (["a", "z"], "cat", "no adapter 'z'"),
        (["a", "b"], "ties", "density"),
    ]:
        with pytest.raises(AdapterError, match=message):
            ours.add_weighted_adapter(names, [1.0] * len(names), "new", kind)
    assert list(ours.peft_config) == ["a", "b", "c", "d"]


def test_a_hot_swap_overwrites_in_place(make, ids, tmp_path):
    new = get_peft_model(
        make(), LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    new.save_pretrained(tmp_path / "new")
    model = get_peft_model(make(), LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)).eval()
    places = {name: parameter for name, parameter in model.named_parameters() if ".adapters." in name}
    hotswap_adapter(model, tmp_path / "new", "default")
    close(logits(model, ids), logits(new, ids))
    assert all(model.get_parameter(name) is parameter for name, parameter in places.items())
    assert model.peft_config["default"].lora_alpha == 5


def test_a_hot_swap_that_does_not_fit_changes_nothing(make, ids, tmp_path):
    model = get_peft_model(make(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    before = logits(model, ids)
    for settings, message in [
        ({"r": 2, "target_modules": TARGETS}, "adapts 3 layers that the loaded one does not"),
        ({"r": 4, "target_modules": ["q_proj"]}, "rank is 4, the loaded one's 2"),
        ({"r": 2, "target_modules": ["q_proj"], "use_dora": True}, "more than A and B"),
    ]:
        folder = tmp_path / message.split()[0] / str(settings["r"])
        get_peft_model(make(), LoraConfig(**settings)).save_pretrained(folder)
        with pytest.raises(AdapterError, match=message):
            hotswap_adapter(model, folder, "default")
    assert torch.equal(logits(model, ids), before)


def test_the_states_say_what_peft_says(pair, ids):
    ours, theirs = pair
    fields = ("enabled", "active_adapters", "merged_adapters", "available_adapters", "devices", "quantization_backend")
    for step in (lambda m: None, lambda m: m.set_adapter("b"), lambda m: m.merge_adapter(["b"])):
        step(ours), step(theirs)
        mine, expected = (
            dataclasses.asdict(get(model)) for get, model in ((get_model_status, ours), (peft.get_model_status, theirs))
        )
        assert {f: mine[f] for f in fields} == {f: expected[f] for f in fields}
        assert mine["num_adapter_layers"] == expected["num_adapter_layers"] == 6
        layers = [dataclasses.asdict(layer) for layer in get_layer_status(ours)]
        others = [dataclasses.asdict(layer) for layer in peft.get_layer_status(theirs)]
        assert [{f: layer[f] for f in fields} for layer in layers] == [
            {f: layer[f] for f in fields} for layer in others
        ]
        assert [f"model.{layer['name']}" for layer in layers] == [layer["name"] for layer in others]
    assert mine["requires_grad"] == {"a": False, "b": False}
    with ours.disable_adapter():
        assert not get_model_status(ours).enabled


def test_an_adapter_is_injected_into_the_model_itself(make, ids):
    model = make()
    same = inject_adapter_in_model(LoraConfig(target_modules=TARGETS, init_lora_weights=False), model)
    assert same is model
    assert get_model_status(model).num_adapter_layers == 6
    assert (logits(model, ids) - logits(make(), ids)).abs().max() > 1e-3


def test_eva_takes_its_first_weights_from_the_inputs(make, ids):
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="eva", eva_config={"rho": 2.0, "tau": 0.9})
    model = get_peft_model(make(), config)
    batches = [
        {"input_ids": torch.randint(1, 96, (8, 20), generator=torch.Generator().manual_seed(n))} for n in range(3)
    ]
    initialize_lora_eva_weights(model, batches)
    tensors = get_peft_model_state_dict(model)
    ranks = {key: len(A) for key, A in tensors.items() if "lora_A" in key}
    assert sum(ranks.values()) == 24
    assert max(ranks.values()) <= 8
    for key, A in tensors.items():
        if "lora_A" in key:
            torch.testing.assert_close(A @ A.T, torch.eye(len(A)), atol=1e-3, rtol=0)
        else:
            assert not A.any()
    assert torch.equal(logits(model.eval(), ids), logits(make(), ids))  # B is zero
    disturb(model, 0.1)
    assert model.active_adapters == ["default"]
    with pytest.raises(AdapterError, match="init_lora_weights='eva'"):
        initialize_lora_eva_weights(get_peft_model(make(), LoraConfig(target_modules=TARGETS)), batches)


def test_loftq_gives_back_what_quantising_took(tmp_path):
    """A LoRA of full rank on a 4-bit base computes as the unquantised model did; of rank 8, nearer to it than none."""
    original = llama(hidden_size=64, intermediate_size=64, num_attention_heads=2)
    original.save_pretrained(tmp_path)
    ids = torch.randint(1, 96, (2, 7), generator=torch.Generator().manual_seed(0))
    exact, errors = logits(original, ids), []
    for r in (64, 8):
        model, _ = quantised_and_plain(4)
        adapted = get_peft_model(model, LoraConfig(r=r, lora_alpha=5, target_modules=["q_proj", "down_proj"])).eval()
        without = (logits(adapted, ids) - exact).norm()
        replace_lora_weights_loftq(adapted, tmp_path)
        errors.append((logits(adapted, ids) - exact).norm() / without)
    assert errors[0] < 1e-3
    assert errors[1] < 0.95
    with pytest.raises(AdapterError, match=r"has no weight of model\.layers\.0"):
        replace_lora_weights_loftq(adapted, tmp_path / "nowhere")
