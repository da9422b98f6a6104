"""C3A, MiSS and GraLoRA: updates made of blocks."""

from __future__ import annotations

import peft
import pytest
import torch
from grid import MethodTests, close, disturb, losses, outputs
from peft.tuners.c3a.utils import BlockCircularConvolution, get_circulant_fast
from torch import nn

from nbtune.errors import AdapterError
from nbtune.peft import PeftModel, get_peft_model, get_peft_model_state_dict
from nbtune.peft.configs.low_rank import GraloraConfig, MissConfig
from nbtune.peft.configs.sparse import C3AConfig
from nbtune.peft.methods.c3a import C3A


class TestC3A(MethodTests):
    config, oracle = C3AConfig, peft.C3AConfig
    noise, adds = 0.2, False  # with two active adapters, PEFT gives the second the output of the first
    cases = [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "block_size": 8}),
        ("llama", {"target_modules": ["v_proj"], "block_size": 16, "modules_to_save": ["lm_head"]}),
        (
            "t5",
            {"target_modules": ["q", "wo"], "block_size": 16, "block_size_pattern": {"wo": 4}, "init_weights": True},
        ),
        ("bert", {"target_modules": ["query", "dense"], "block_size": 8, "bias": "c3a_only"}),
        ("bert", {"target_modules": ["query"], "block_size": 1, "init_weights": "gaussian", "bias": "all"}),
    ]

    def test_ten_steps_give_the_losses_of_peft(self, make, case, tmp_path, monkeypatch):
        """PEFT's gradient for the input is wrong (below), so autograd differentiates its dense matrix here."""

        def apply(x, kernel):
            return x @ get_circulant_fast(kernel).T

        monkeypatch.setattr(peft.tuners.c3a.layer.BlockCircularConvolution, "apply", apply)
        super().test_ten_steps_give_the_losses_of_peft(make, case, tmp_path)


def test_the_gradient_of_c3a_for_its_input_is_right_where_that_of_peft_is_not():
    torch.manual_seed(0)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    base = nn.Linear(12, 8, dtype=torch.float64)
    adapter = C3A(kernel.detach())
    ours = 12 * adapter(x, torch.zeros(3, 8, dtype=torch.float64), base)  # PEFT divides outside
    theirs = BlockCircularConvolution.apply(x, kernel)
    close(ours, theirs, atol=1e-12)
    to = torch.randn_like(ours)
    right = to @ get_circulant_fast(kernel.detach())
    mine = torch.autograd.grad((ours * to).sum(), (x, adapter.c3a_kernel))
    others = torch.autograd.grad((theirs * to).sum(), (x, kernel))
    close(mine[1], others[1], atol=1e-12)
    close(mine[0], right, atol=1e-12)
    assert (others[0] - right).abs().max() > 1


class TestMiss(MethodTests):
    config, oracle = MissConfig, peft.MissConfig
    cases = [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 8}),
        ("llama", {"target_modules": ["v_proj"], "r": 5, "init_weights": False, "modules_to_save": ["lm_head"]}),
        ("t5", {"target_modules": ["q", "wo"], "r": 7}),
        ("t5", {"target_modules": ["q", "wi"], "r": 8, "init_weights": "mini", "mini_r": 4}),
        ("bert", {"target_modules": ["query", "dense"], "r": 8, "bias": "MiSS_only"}),
    ]


class TestMissBat(MethodTests):
    config, oracle = MissConfig, peft.MissConfig
    adds = False  # in PEFT the second active adapter starts from the weight that the first has changed
    cases = [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 8, "init_weights": "bat"}),
        ("t5", {"target_modules": ["q", "wo"], "r": 4, "init_weights": "bat"}),
        ("bert", {"target_modules": ["query"], "r": 16, "init_weights": "bat", "bias": "all"}),
    ]


class TestGralora(MethodTests):
    config, oracle = GraloraConfig, peft.GraloraConfig
    learning_rate = 3e-3  # at 1e-2 BERT's steps magnify what fp32 rounds away
    cases = [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 8}),
        ("llama", {"target_modules": ["v_proj"], "r": 6, "hybrid_r": 3, "modules_to_save": ["lm_head"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 8, "gralora_k": 4, "bias": "gralora_only"}),
        ("t5", {"target_modules": ["q", "wo"], "r": 4, "gralora_k": 1, "alpha": 5}),
        ("bert", {"target_modules": ["query", "dense"], "r": 4, "hybrid_r": 2, "init_weights": False}),
    ]


BLOCKS = {
    "c3a": C3AConfig(block_size=4),
    "c3a odd": C3AConfig(block_size=1),
    "miss": MissConfig(r=5),
    "mini": MissConfig(r=6, init_weights="mini", mini_r=4),
    "gralora": GraloraConfig(r=6, gralora_k=2, hybrid_r=2),
}


@pytest.mark.parametrize("config", BLOCKS.values(), ids=list(BLOCKS))
def test_the_forward_pass_is_that_of_the_dense_update(config):
    base = nn.Linear(12, 8, dtype=torch.float64)
    model = get_peft_model(nn.Sequential(base), config.replace(target_modules=["0"]))
    disturb(model, 1.0)
    adapter = model.base_model.model[0].adapters["default"]
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    out, expected = adapter(x, base(x), base), base(x) + x @ adapter.delta_weight(base).T
    close(out, expected, atol=1e-12)
    to = torch.randn_like(out)
    wanted = (x, *adapter.parameters())
    gradients = [torch.autograd.grad((y * to).sum(), wanted, retain_graph=True) for y in (out, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        close(mine, theirs, atol=1e-12)


def test_blocks_of_c3a_are_circulant():
    model = get_peft_model(nn.Sequential(nn.Linear(12, 6)), C3AConfig(block_size=3, target_modules=["0"]))
    layer = model.base_model.model[0]
    delta = layer.adapters["default"].delta_weight(layer.base_layer)
    for block in (delta[m : m + 3, n : n + 3] for m in (0, 3) for n in (0, 3, 6, 9)):
        assert torch.equal(block.roll((1, 1), (0, 1)), block)
        assert len(block.unique()) == 3


def test_two_adapters_of_c3a_are_right_where_peft_is_not(make, tmp_path):
    """PEFT overwrites the input with the first adapter's output; square layers let it pass."""
    ours = get_peft_model(make(), C3AConfig(block_size=8, target_modules=["o_proj"]), "a").eval()
    ours.add_adapter("b", C3AConfig(block_size=4, target_modules=["o_proj"]))
    disturb(ours, 1.0)
    ours.save_pretrained(tmp_path)
    ours.set_adapter(["a", "b"])
    together = outputs(ours, "llama")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "a", "a").eval()
    theirs.load_adapter(tmp_path / "b", "b")
    theirs.base_model.set_adapter(["a", "b"])
    assert (outputs(theirs, "llama") - together).abs().max() > 1e-2
    theirs.merge_adapter()  # its merge is right
    close(outputs(theirs, "llama"), together)


def test_each_adapter_of_miss_keeps_its_variant(make, tmp_path):
    """PEFT computes all of them as the first was made."""
    ours = get_peft_model(make(), MissConfig(r=8, target_modules=["q_proj"], init_weights=False), "a").eval()
    ours.add_adapter("b", MissConfig(r=4, target_modules=["q_proj"], init_weights="bat"))
    ours.add_adapter("c", MissConfig(r=8, target_modules=["q_proj"], init_weights="mini", mini_r=2))
    disturb(ours, 0.1)
    ours.save_pretrained(tmp_path)
    for name in "abc":
        ours.set_adapter(name)
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path / name).eval()
        close(outputs(ours, "llama"), outputs(theirs, "llama"))
    names = ["c", "a", "b", "c"]
    expected = []
    for row, name in enumerate(names):
        ours.set_adapter(name)
        expected.append(outputs(ours, "llama")[row])
    close(outputs(ours, "llama", adapter_names=names), torch.stack(expected))
    ours.set_adapter(["a", "b", "c"])
    together = outputs(ours, "llama")
    ours.merge_adapter()
    close(outputs(ours, "llama"), together)


ON_CONV1D = {
    "c3a": (C3AConfig(block_size=8), peft.C3AConfig(block_size=8), 0.2),
    "miss": (MissConfig(r=8), peft.MissConfig(r=8), 0.05),
    "bat": (MissConfig(r=8, init_weights="bat"), peft.MissConfig(r=8, init_weights="bat"), 0.05),
}


@pytest.mark.parametrize(("config", "theirs", "noise"), ON_CONV1D.values(), ids=list(ON_CONV1D))
def test_conv1d_which_peft_refuses(make, tmp_path, config, theirs, noise):
    theirs.target_modules = {"c_attn"}
    with pytest.raises(TypeError, match="not supported"):
        peft.get_peft_model(make("gpt2"), theirs)
    ours = get_peft_model(make("gpt2"), config.replace(target_modules=["c_attn"])).eval()
    disturb(ours, noise)
    expected = outputs(ours, "gpt2")
    assert (expected - outputs(make("gpt2"), "gpt2")).abs().max() > 1e-3
    ours.save_pretrained(tmp_path)
    close(outputs(PeftModel.from_pretrained(make("gpt2"), tmp_path), "gpt2"), expected)
    ours.merge_adapter()
    close(outputs(ours, "gpt2"), expected)
    ours.unmerge_adapter()
    seen = losses(ours, "gpt2", 1e-2)
    assert seen[-1] < seen[0]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (C3AConfig(), "0 is 8 x 12; block_size 256 does not divide both.\nSet .* to a divisor of 4"),
        (MissConfig(r=13), "0 is 8 x 12: r 13 is more than its 12 inputs.\nSet r to at most 12"),
        (MissConfig(r=8, init_weights="bat"), "0 is 8 x 12; r 8 does not divide both.\nSet r to a divisor of 4"),
        (MissConfig(r=8, init_weights="mini", mini_r=3), "mini_r 3 does not divide its 8 outputs"),
        (GraloraConfig(gralora_k=8), "0 is 8 x 12; gralora_k 8 does not divide both.\nSet gralora_k to a divisor of 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config, says):
    base = nn.Sequential(nn.Linear(12, 8))
    with pytest.raises(AdapterError, match=says):
        get_peft_model(base, config.replace(target_modules=["0"]))
    assert type(base[0]) is nn.Linear


def test_the_rank_of_gralora_is_a_multiple_of_its_blocks():
    with pytest.raises(AdapterError, match="r is 9; it must be a multiple of gralora_k, 2"):
        GraloraConfig(r=9)


STARTS = [(C3AConfig, {"block_size": 1, "init_weights": init}) for init in (True, False, "gaussian", "kaiming_uniform")]
STARTS += [(MissConfig, {"r": 16, "init_weights": init}) for init in (True, False, "bat")]
STARTS += [(GraloraConfig, {"r": 16, "hybrid_r": 16, "init_weights": init}) for init in (True, False)]


@pytest.mark.parametrize(("config", "settings"), STARTS)
def test_first_weights_are_distributed_as_in_peft(make, config, settings):
    ours = get_peft_model_state_dict(get_peft_model(make(), config(target_modules=["up_proj"], **settings)))
    oracle = getattr(peft, config.__name__)(target_modules=["up_proj"], **settings)
    theirs = peft.get_peft_model_state_dict(peft.get_peft_model(make(), oracle))
    for key in theirs:
        torch.testing.assert_close(ours[key].std(), theirs[key].std(), atol=0, rtol=0.15)
        torch.testing.assert_close(ours[key].abs().max(), theirs[key].abs().max(), atol=0, rtol=0.5)


@pytest.mark.parametrize("config", [MissConfig(r=8, miss_dropout=0.5), GraloraConfig(r=4, gralora_dropout=0.5)])
def test_dropout_is_for_training(make, config):
    ours = get_peft_model(make(), config.replace(target_modules=["q_proj"], init_weights=False)).eval()
    assert torch.equal(outputs(ours, "llama"), outputs(ours, "llama"))
    ours.train()
    assert not torch.equal(outputs(ours, "llama"), outputs(ours, "llama"))
