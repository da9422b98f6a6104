"""Which modules a config means: the same as in PEFT, for every way of saying it."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import MODELS
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from nbtune.errors import AdapterError
from nbtune.peft import LoraConfig, find_targets, get_peft_model
from nbtune.peft.inject import adapter_layers
from nbtune.peft.targets import resolve

CONFIGS = {
    "llama": [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["self_attn.q_proj"]},
        {"target_modules": ["model.layers.1.self_attn.q_proj", "down_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": r".*layers\.[02]\.mlp\.(up|down)_proj"},
        {"target_modules": r"model\.layers\.\d+\.self_attn\..*_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": "ALL-LINEAR"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj", "layers.1.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.0\..*"},
        {"target_modules": ["q_proj"], "exclude_modules": ["model.layers.2.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
        # a full path is meant whatever its block
        {"target_modules": ["q_proj", "model.layers.0.self_attn.v_proj"], "layers_to_transform": [2]},
        {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "gate_proj"], "modules_to_save": ["mlp"]},
    ],
    "neox": [
        {"target_modules": ["query_key_value"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["dense"]},  # not dense_h_to_4h
        {"target_modules": r".*\.dense.*", "exclude_modules": r".*4h"},
        {"target_modules": ["dense_h_to_4h"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ],
    "bert": [
        {"target_modules": ["query", "value"]},
        {"target_modules": ["attention.output.dense"]},
        {"target_modules": ["dense"], "layers_to_transform": [0]},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
        {"target_modules": ["query"], "task_type": "SEQ_CLS"},
    ],
}


def of_peft(model: nn.Module, settings: dict) -> set[str]:
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **settings))
    modules = adapted.base_model.model.named_modules()
    return {name for name, module in modules if isinstance(module, BaseTunerLayer)}


@pytest.mark.parametrize(("name", "settings"), [(name, each) for name, all_ in CONFIGS.items() for each in all_])
def test_the_same_modules_as_peft(make, name, settings):
    theirs = of_peft(make(name), settings)
    config = LoraConfig(r=2, **settings)
    assert set(find_targets(make(name), config)) == theirs
    # A second adapter finds the same modules in a model that has adapters already.
    model = get_peft_model(make(name), LoraConfig(r=2, target_modules="all-linear"), "first")
    assert set(find_targets(model.get_base_model(), config)) == theirs


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_resolved_targets_mean_the_same_to_peft(make, name, targets):
    config = resolve(make(name), LoraConfig(target_modules=targets))
    assert isinstance(config.target_modules, list)
    assert len(config.target_modules) < 10
    assert of_peft(make(name), {"target_modules": config.target_modules}) == set(
        find_targets(make(name), LoraConfig(target_modules=targets))
    )


def test_without_targets_blocks_can_still_be_chosen(base):
    found = find_targets(base, LoraConfig(layers_to_transform=[1], exclude_modules=["v_proj"]))
    assert found == ["model.layers.1.self_attn.q_proj"]


def test_blocks_can_be_chosen_of_all_linear_layers(base):
    found = find_targets(base, LoraConfig(target_modules="all-linear", layers_to_transform=[1]))  # refused by PEFT
    assert len(found) == 7
    assert all(path.startswith("model.layers.1.") for path in found)


def test_targets_are_found_without_weights(base):
    with torch.device("meta"):
        empty = type(base)(base.config)
    assert find_targets(empty, LoraConfig()) == find_targets(base, LoraConfig())


def test_a_shared_module_is_adapted_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])
            self.again = self.layers

        def forward(self, x):
            return self.layers[0](x) + self.again[0](x)

    model = get_peft_model(Shared(), LoraConfig(r=2, target_modules=["0"], exclude_modules=["layers.0"]))
    assert [path for path, _ in adapter_layers(model.get_base_model())] == ["layers.0.0"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_porj"]}, "Did you mean q_proj"),
        ({"target_modules": ["v_proj", "q_porj"]}, "no module of the model matches 'q_porj'"),
        ({"target_modules": ["self_atn.q_proj"]}, "Did you mean self_attn.q_proj"),
        ({"target_modules": ["zzz"]}, "There are: model, "),
        ({"target_modules": r"encoder\..*"}, "no module of the model matches"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "left out by another setting"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, "left out by another setting"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]}, "Did you mean lm_head"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 4}}, "rank_pattern: no module"),
        ({"target_modules": ["model.norm"]}, "model.norm is a LlamaRMSNorm; LORA adapts Linear"),
        ({"target_modules": ["self_attn"]}, "LlamaAttention; LORA adapts Linear"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["mlp", "up_proj"]}, "named twice"),
    ],
)
def test_what_matches_nothing_is_an_error_that_helps(base, settings, message):
    before = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(AdapterError) as caught:
        get_peft_model(base, LoraConfig(r=2, **settings))
    assert message in str(caught.value)
    assert {name: type(module) for name, module in base.named_modules()} == before
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_a_model_without_blocks_asks_for_names():
    with pytest.raises(AdapterError, match="Linear layers here: 0"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig())


def test_a_quantised_module_is_refused_by_name():
    model = nn.ModuleDict({"proj": nn.Linear(4, 4)})
    model["proj"].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(AdapterError, match=r"proj \(Linear\) holds torch.uint8"):
        get_peft_model(model, LoraConfig(target_modules=["proj"]))


def test_layers_whose_weight_is_read_past_them_are_refused():
    """An adapter there would do nothing, or something else in a fused kernel; PEFT refuses out_proj and conv1d too."""
    mamba = MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, state_size=4))
    for name in ("out_proj", "dt_proj", "conv1d"):
        with pytest.raises(AdapterError, match=f"{name} is not called: MambaMixer reads its weight"):
            get_peft_model(mamba, LoraConfig(target_modules=[name]))
    with pytest.raises(AdapterError, match="not called"):
        get_peft_model(mamba, LoraConfig(target_modules="all-linear"))
    get_peft_model(mamba, LoraConfig(target_modules=["in_proj", "x_proj"]))
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(AdapterError, match="MultiheadAttention reads its weight"):
        get_peft_model(attention, LoraConfig(target_modules=["out_proj"]))
