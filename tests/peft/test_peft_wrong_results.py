"""The eight wrong results that were measured in peft 0.21.2 (workshop reference, section 8), right here."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from grid import close, disturb
from tiny_models import llama, logits, quantised_and_plain
from torch import nn

import nbtune.peft
from nbtune.peft import LoraConfig, PeftModel, PeftType, get_peft_model

# Every method that adapts layers, with settings that suit the tiny model's 64 features.
SETTINGS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 4},
    "AdaLoraConfig": {"init_r": 4, "target_r": 2, "total_step": 100},
    "IA3Config": {"feedforward_modules": ["down_proj"]},
    "BeftConfig": {},
    "OFTConfig": {"oft_block_size": 8},
    "BOFTConfig": {"boft_block_size": 8},
    "HRAConfig": {"r": 4},
    "LoHaConfig": {"r": 4},
    "LoKrConfig": {"r": 4},
    "VeraConfig": {"r": 8},
    "RandLoraConfig": {"r": 8},
    "FourierFTConfig": {"n_frequency": 50},
    "WaveFTConfig": {"n_frequency": 50},
    "C3AConfig": {"block_size": 8},
    "VBLoRAConfig": {"r": 4, "vector_length": 16, "num_vectors": 8},
    "ShiraConfig": {"r": 4},
    "HiraConfig": {"r": 4},
    "MissConfig": {"r": 8},
    "GraloraConfig": {"r": 8},
    "RoadConfig": {},
    "DeloraConfig": {"r": 4},
}
TARGETS = ["q_proj", "down_proj"]


def config_of(name: str, **more: Any) -> nbtune.peft.LayerConfig:
    return getattr(nbtune.peft, name)(target_modules=TARGETS, **SETTINGS[name], **more)


@pytest.fixture
def tokens():
    return torch.randint(1, 96, (3, 7), generator=torch.Generator().manual_seed(0))


def test_the_list_has_every_method_that_adapts_linear_layers():
    other = {"LN_TUNING", "TRAINABLE_TOKENS", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"}
    assert {getattr(nbtune.peft, name).peft_type for name in SETTINGS} == set(PeftType) - other


@pytest.mark.parametrize("name", SETTINGS)
def test_1_rows_get_their_adapter_with_every_method(name, tokens):
    base = llama(hidden_size=64, intermediate_size=64, num_attention_heads=2)
    model = get_peft_model(base, config_of(name), "a")
    model.add_adapter("b", config_of(name, **({"inference_mode": True} if name == "AdaLoraConfig" else {})))
    model.set_requires_grad(["a", "b"])
    disturb(model, 0.05)
    model.eval()
    one_by_one = []
    for row, adapter in enumerate(["b", "__base__", "a"]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if adapter == "__base__":
                with model.disable_adapter():
                    one_by_one.append(logits(model, tokens[row : row + 1]))
            else:
                model.set_adapter(adapter)
                one_by_one.append(logits(model, tokens[row : row + 1]))
    close(logits(model, tokens, adapter_names=["b", "__base__", "a"]), torch.cat(one_by_one), atol=2e-5)
    with pytest.raises(nbtune.errors.AdapterError, match="no adapter 'c'"):
        model(input_ids=tokens, adapter_names=["a", "c", "b"])


@pytest.mark.parametrize("bits", [4, 8])
def test_2_merging_on_a_cpu_after_a_forward_pass_is_right(bits, tokens):
    model, plain = quantised_and_plain(bits)
    ours, expected = (get_peft_model(m, config_of("LoraConfig")) for m in (model, plain))
    for adapted in (ours, expected):
        disturb(adapted.eval(), 0.1)
    nbtune.peft.set_peft_model_state_dict(ours, nbtune.peft.get_peft_model_state_dict(expected))
    before = logits(ours, tokens)  # bitsandbytes repacks the weights in its first eval forward
    reports = ours.merge_adapter()
    expected.merge_adapter()
    weights = [layer.self_attn.q_proj.base_layer.weight.float() for layer in ours.get_base_model().model.layers]
    exact = [layer.self_attn.q_proj.base_layer.weight for layer in expected.get_base_model().model.layers]
    for merged, weight in zip(weights, exact, strict=True):
        assert (merged - weight).norm() / weight.norm() < (1e-6 if bits == 4 else 4e-3)  # fp32; rounded to bf16
    assert len(reports) == 6
    assert max(report.relative_error for report in reports) < 4e-3
    ours.unmerge_adapter()
    assert torch.equal(logits(ours, tokens), before)
    again = ours.merge_adapter(requantise=True)
    assert 1e-3 < max(report.relative_error for report in again) < 0.2
    merged = logits(ours, tokens)
    with ours.disable_adapter():
        assert not torch.equal(logits(ours, tokens), merged)
    assert torch.equal(logits(ours, tokens), merged)
    ours.unmerge_adapter()
    assert torch.equal(logits(ours, tokens), before)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", SETTINGS)
def test_3_and_7_every_method_is_right_on_a_quantised_base(name, bits, tokens):
    """RandLoRA merges its factors in the wrong order in PEFT; others read the codes as weights, without an error."""
    model, plain = quantised_and_plain(bits)
    ours, expected = (get_peft_model(m, config_of(name)) for m in (model, plain))
    disturb(expected.eval(), 0.05)
    nbtune.peft.set_peft_model_state_dict(ours.eval(), nbtune.peft.get_peft_model_state_dict(expected))
    tolerance = 1e-4 if bits == 4 else 2e-2  # an 8-bit product quantises its inputs too
    close(logits(ours, tokens), logits(expected, tokens), atol=tolerance)
    assert (logits(expected, tokens) - logits(plain_of(expected), tokens)).abs().max() > 3e-4
    ours.merge_adapter()
    close(logits(ours, tokens), logits(expected, tokens), atol=max(tolerance, 2e-2))


def plain_of(model: PeftModel) -> nn.Module:
    return copy.deepcopy(model).unload()


def test_4_two_active_c3a_adapters_compute_what_they_merge_to(tokens):
    base = llama(hidden_size=64, intermediate_size=64, num_attention_heads=2)
    model = get_peft_model(base, config_of("C3AConfig"), "a")
    model.add_adapter("b", config_of("C3AConfig"))
    disturb(model.eval(), 0.1)
    model.set_adapter(["a", "b"])
    together = logits(model, tokens)
    model.merge_adapter()
    close(logits(model, tokens), together)


def test_5_merging_and_unmerging_leaves_every_bit_of_a_bfloat16_base(tokens):
    base = llama().to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    for _ in range(10):
        model.merge_adapter()
        model.unmerge_adapter()
    after = model.unload().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_6_shared_bases_are_stored_once(tmp_path):
    for layers in (2, 6):
        base = llama(num_hidden_layers=layers)
        model = get_peft_model(base, nbtune.peft.RandLoraConfig(r=4, target_modules=["q_proj"]))
        model.save_pretrained(tmp_path / f"ours{layers}")
        theirs = peft.get_peft_model(
            llama(num_hidden_layers=layers), peft.RandLoraConfig(r=4, target_modules=["q_proj"])
        )
        theirs.save_pretrained(tmp_path / f"theirs{layers}")

    def shared(who: str, layers: int) -> int:
        tensors = safetensors.torch.load_file(tmp_path / f"{who}{layers}" / "adapter_model.safetensors")
        return sum(tensor.nbytes for key, tensor in tensors.items() if key.endswith(("_A", "_B")))

    assert shared("ours", 6) == shared("ours", 2) > 0
    assert shared("theirs", 6) > shared("theirs", 2)


def test_8_running_the_cell_again_with_other_targets_leaves_nothing_of_the_first_run(make, tmp_path, tokens):
    base = make()
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model = get_peft_model(base, LoraConfig(target_modules=["v_proj"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    keys = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert keys
    assert not [key for key in keys if "v_proj" not in key]
    assert all(not isinstance(block.self_attn.q_proj, nbtune.peft.AdapterLayer) for block in base.model.layers)
    close(logits(peft.PeftModel.from_pretrained(make(), tmp_path), tokens), logits(model, tokens))
