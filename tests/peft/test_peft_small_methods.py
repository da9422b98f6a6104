"""Methods that train vectors: IA3 (scaled activations), LN tuning (whole norms), BEFT (biases)."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from grid import MethodTests, close, disturb, outputs
from torch import nn

from nbtune.errors import AdapterError
from nbtune.peft import PeftModel, get_peft_model
from nbtune.peft.configs.vectors import BeftConfig, IA3Config, LNTuningConfig
from nbtune.peft.methods.ia3 import IA3


class TestIA3(MethodTests):
    config, oracle = IA3Config, peft.IA3Config
    noise = 0.2
    learning_rate = 3e-2
    cases = [
        ("llama", {}),
        ("llama", {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": []}),
        ("llama", {"target_modules": r".*\.(k_proj|up_proj)", "feedforward_modules": r".*\.up_proj"}),
        ("gpt2", {}),
        ("t5", {"modules_to_save": ["lm_head"]}),
        ("bert", {"task_type": "SEQ_CLS"}),
    ]


class TestLNTuning(MethodTests):
    config, oracle = LNTuningConfig, peft.LNTuningConfig
    learning_rate = 3e-2
    cases = [
        ("llama", {}),
        ("llama", {"target_modules": r".*layernorm", "exclude_modules": ["layers.0.input_layernorm"]}),
        ("llama", {"target_modules": ["norm", "layers.1.mlp"]}),  # any module: here a whole block of linears
        ("gpt2", {}),
        ("t5", {"modules_to_save": ["lm_head"]}),
        ("bert", {"target_modules": ["LayerNorm"], "task_type": "SEQ_CLS"}),
    ]

    def test_two_active_adapters(self, make, case):
        ours = self.two(make, case)
        ours.set_adapter(["a", "b"])
        with pytest.raises(AdapterError, match="2 active adapters replace one"):
            outputs(ours, case[0])
        with pytest.raises(AdapterError, match="Two adapters meet in"):
            ours.merge_adapter()


class TestBeft(MethodTests):
    config, oracle = BeftConfig, peft.BeftConfig
    noise = 0.2
    learning_rate = 3e-2
    cases = [
        ("llama", {}),
        ("llama", {"target_modules": r".*\.(q|down)_proj", "modules_to_save": ["lm_head"]}),
        ("t5", {}),
        ("bert", {"target_modules": ["value", "dense"], "task_type": "SEQ_CLS"}),
    ]


class TestBeftConv1D(MethodTests):
    """PEFT has no BEFT on Conv1D: the invariants alone."""

    config, oracle = BeftConfig, peft.BeftConfig
    noise = 0.2
    adds = False
    cases = [("gpt2", {"target_modules": ["c_attn"]})]
    test_saved_here_loads_in_peft = None
    test_saved_in_peft_loads_here = None
    test_the_config_file_says_what_peft_says = None
    test_ten_steps_give_the_losses_of_peft = None

    def test_peft_cannot(self, make, case):
        with pytest.raises(TypeError, match="not supported"):
            peft.get_peft_model(make(case[0]), self.oracle(**case[1]))


def test_beft_merges_into_a_layer_without_a_bias(make, tmp_path):
    ours = get_peft_model(make("llama"), BeftConfig())
    disturb(ours, 0.2)
    ours.save_pretrained(tmp_path)
    expected = outputs(ours.eval(), "llama")
    plain = ours.merge_and_unload()
    assert plain.model.layers[0].self_attn.v_proj.bias.shape == (16,)
    close(outputs(plain, "llama"), expected)
    with pytest.raises(ValueError, match="no bias"):
        peft.PeftModel.from_pretrained(make("llama"), tmp_path).merge_and_unload()


def test_ln_tuning_refuses_a_module_inside_another(make):
    with pytest.raises(AdapterError, match=r"layers.1.mlp.up_proj is part of model.layers.1.mlp"):
        get_peft_model(make("llama"), LNTuningConfig(target_modules=["layers.1.mlp", "up_proj"]))


class Net(nn.Module):
    """One of each kind of convolution, the second in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Conv2d(4, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 6, 3, groups=2)
        self.deep = nn.Conv3d(1, 6, (3, 2, 2))

    def forward(self, x):
        return self.deep(self.grouped(self.flat(x))[:, None])


@pytest.mark.parametrize("feedforward", [[], ["flat", "grouped", "deep"]])
def test_ia3_on_convolutions_is_that_of_peft_and_merges(feedforward, tmp_path):
    settings = {"target_modules": ["flat", "grouped", "deep"], "feedforward_modules": feedforward}
    torch.manual_seed(0)
    net, x = Net(), torch.randn(3, 4, 9, 9)
    plain = net(x)
    ours = get_peft_model(net, IA3Config(**settings)).eval()
    disturb(ours, 0.3)
    ours.save_pretrained(tmp_path)
    expected = ours(x)
    assert (expected - plain).abs().max() > 0.05
    copy = Net()
    copy.load_state_dict({**Net().state_dict(), **get_state(net)})
    close(peft.PeftModel.from_pretrained(copy, tmp_path)(x), expected)
    ours.merge_adapter()
    close(ours(x), expected)


def get_state(net):
    return {
        name.replace("base_layer.", ""): value for name, value in net.state_dict().items() if ".adapters." not in name
    }


def test_ia3_feedforward_modules_must_be_targets():
    with pytest.raises(AdapterError, match="down_proj: named in feedforward_modules and not in target_modules"):
        IA3Config(target_modules=["k_proj"], feedforward_modules=["down_proj"])
    with pytest.raises(ValueError, match="subset"):
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=["down_proj"])


def test_ia3_files_that_peft_writes_and_cannot_read(make, tmp_path):
    settings = {"target_modules": "all-linear", "feedforward_modules": ["down_proj"]}
    theirs = peft.get_peft_model(make("llama"), peft.IA3Config(**settings)).eval()
    disturb(theirs, 0.2)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="subset"):
        peft.PeftModel.from_pretrained(make("llama"), tmp_path)
    close(outputs(PeftModel.from_pretrained(make("llama"), tmp_path), "llama"), outputs(theirs, "llama"))


def test_ia3_vectors_combine_as_in_peft(make, tmp_path):
    ours = get_peft_model(make("llama"), IA3Config(), "a")
    disturb(ours, 0.3)
    ours.add_adapter("b", IA3Config())
    disturb(ours, 0.3, seed=6)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "a", "a")
    theirs.load_adapter(tmp_path / "b", "b")
    theirs.base_model.add_weighted_adapter(["a", "b"], [0.7, -0.2], "c")
    layers = {path: module for path, module in theirs.named_modules() if isinstance(module, peft.tuners.ia3.IA3Layer)}
    assert len(layers) == 9
    mine: list[Any] = []
    for path, layer in layers.items():
        mine = [ours._adapters(name)[path.removeprefix("base_model.model.")] for name in ("a", "b")]
        torch.testing.assert_close(IA3.combined(mine, [0.7, -0.2], "linear").ia3_l, layer.ia3_l["c"])
    with pytest.raises(AdapterError, match="only summed"):
        IA3.combined(mine, [1.0, 1.0], "svd")
