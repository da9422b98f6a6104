"""Files go from nbtune to `peft` and back, with the same logits; training takes the same steps."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from tiny_models import logits
from torch import nn

from nbtune.errors import AdapterError
from nbtune.peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

# Random A and B (init_lora_weights=False), so that every adapter changes the logits.
SETTINGS = {
    "names": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r".*layers\.[12]\.mlp\.(up|down)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "exclude": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 5},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"v_proj": 3, r"layers\.1\.self_attn\.q_proj": 5, r"[02]\.self_attn\.q_proj": 7},
        "alpha_pattern": {"up_proj": 20, "layers.0.self_attn.q_proj": 2.5},
        "use_rslora": True,
    },
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved module": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved norm": {"target_modules": ["q_proj"], "modules_to_save": ["model.norm", "embed_tokens"]},
    "task": {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"},
}
OTHERS = [
    ("neox", {"target_modules": "all-linear"}),
    ("neox", {"target_modules": ["query_key_value"], "rank_pattern": {"0.attention.query_key_value": 2}}),
    ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": "all-linear", "task_type": "FEATURE_EXTRACTION"}),
]
CASES = [("llama", settings) for settings in SETTINGS.values()] + OTHERS


def disturb(model: nn.Module) -> None:
    """Other values in all that is trained, also in saved modules, which start as copies of the base."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_an_adapter_saved_here_loads_in_peft(make, ids, tmp_path, name, settings):
    ours = get_peft_model(make(name), LoraConfig(r=4, init_lora_weights=False, **settings)).eval()
    disturb(ours)
    ours.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(make(name), tmp_path / "adapter")
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), atol=1e-5, rtol=0)
    assert (logits(ours, ids) - logits(make(name), ids)).abs().max() > 1e-3
    keys = set(get_peft_model_state_dict(ours))
    # PEFT adds the base weight of an adapted head to every file, where nothing of it was trained.
    assert keys == set(peft.get_peft_model_state_dict(theirs)) - {"base_model.model.lm_head.base_layer.weight"}


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_an_adapter_of_peft_loads_here(make, ids, tmp_path, name, settings):
    theirs = peft.get_peft_model(make(name), peft.LoraConfig(r=4, init_lora_weights=False, **settings)).eval()
    disturb(theirs)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(make(name), tmp_path)
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), atol=1e-5, rtol=0)
    assert (logits(ours, ids) - logits(make(name), ids)).abs().max() > 1e-3


def test_the_first_matching_pattern_still_counts_after_saving(make, ids, tmp_path):
    """PEFT sorts the patterns when it writes them, and then cannot read its own file; nbtune keeps their order."""
    patterns = {r"layers\.1\.self_attn\.q_proj": 5, ".*q_proj": 7}
    ours = get_peft_model(
        make(), LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], rank_pattern=patterns)
    )
    ours.eval().save_pretrained(tmp_path)
    assert (
        get_peft_model_state_dict(ours)["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape[0] == 5
    )
    for theirs in (peft.PeftModel.from_pretrained(make(), tmp_path), PeftModel.from_pretrained(make(), tmp_path)):
        torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), atol=1e-5, rtol=0)


def test_base_weights_in_a_file_of_peft_must_be_those_of_the_base(make, ids, tmp_path):
    theirs = peft.get_peft_model(make(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(make(), tmp_path), ids), logits(theirs, ids))
    PeftModel.from_pretrained(make().to(torch.bfloat16), tmp_path)  # the same in another precision
    other = make()
    other.get_input_embeddings().weight.data[0, 0] += 1
    with pytest.raises(AdapterError, match=r"not the same as in this one \(1\):\n.*embed_tokens.weight"):
        PeftModel.from_pretrained(other, tmp_path)


def test_without_targets_the_file_says_which(make, ids, tmp_path):
    ours = get_peft_model(make(), LoraConfig(init_lora_weights=False)).eval()
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), atol=1e-5, rtol=0)


def test_the_config_file_has_every_key_that_peft_writes(make, tmp_path):
    settings = {"r": 4, "target_modules": ["q_proj"]}
    peft.get_peft_model(make(), peft.LoraConfig(**settings)).save_pretrained(tmp_path / "theirs")
    get_peft_model(make(), LoraConfig(**settings)).save_pretrained(tmp_path / "ours")
    theirs, ours = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours"))
    theirs.pop("peft_version")
    assert {key: ours[key] for key in theirs} == theirs


def test_the_base_and_the_task_are_written_as_peft_writes_them(make, tmp_path):
    base = make()
    base.name_or_path = "someone/tiny-llama"
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", revision="v2"))
    model.save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert config.base_model_name_or_path == "someone/tiny-llama"
    assert (config.task_type, config.revision, config.auto_mapping) == ("CAUSAL_LM", "v2", None)
    assert config.inference_mode
    assert not model.peft_config["default"].inference_mode


@pytest.mark.parametrize("r", [1, 8])
def test_ten_steps_give_the_losses_of_peft(make, ids, tmp_path, r):
    settings = {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 16}
    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=r, **settings))
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)

    def losses(model):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        seen = []
        for _ in range(10):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        return torch.tensor(seen)

    mine, expected = losses(ours), losses(theirs)
    torch.testing.assert_close(mine, expected, atol=1e-4, rtol=0)
    assert mine[-1] < mine[0] - 0.1


def test_first_weights_are_distributed_as_in_peft(make):
    for init in (True, False, "gaussian"):
        settings = {"r": 64, "target_modules": ["up_proj"], "init_lora_weights": init}
        ours = get_peft_model_state_dict(get_peft_model(make(), LoraConfig(**settings)))
        theirs = peft.get_peft_model_state_dict(peft.get_peft_model(make(), peft.LoraConfig(**settings)))
        for key in theirs:
            torch.testing.assert_close(ours[key].std(), theirs[key].std(), atol=0, rtol=0.1)
            torch.testing.assert_close(ours[key].abs().max(), theirs[key].abs().max(), atol=0, rtol=0.5)


def test_a_state_dict_gathered_elsewhere_can_be_saved(make, ids, tmp_path):
    """FSDP and DeepSpeed hand over the whole model's tensors, adapters under their names in the model."""
    model = get_peft_model(make(), LoraConfig(r=2, init_lora_weights=False, modules_to_save=["lm_head"]))
    gathered = copy.deepcopy(model.state_dict())
    expected = get_peft_model_state_dict(model)
    assert expected.keys() == get_peft_model_state_dict(model, gathered).keys()
    model.save_pretrained(tmp_path, state_dict=gathered)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(logits(model.eval(), ids), logits(loaded, ids), atol=0, rtol=0)
