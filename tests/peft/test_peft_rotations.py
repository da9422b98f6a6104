"""OFT, BOFT and HRA, which rotate a layer's input, and RoAd, which rotates its output."""

from __future__ import annotations

import warnings

import peft
import peft.tuners.boft.layer
import pytest
import torch
from grid import MethodTests, close, disturb, outputs
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nbtune.errors import AdapterError
from nbtune.peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from nbtune.peft.configs.rotations import BOFTConfig, HRAConfig, OFTConfig, RoadConfig
from nbtune.peft.methods.boft import BOFT
from nbtune.peft.methods.hra import HRA
from nbtune.peft.methods.oft import OFT


class Net(nn.Module):
    """One of each kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.linear = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.embedding(x)).sum() + self.conv(self.embedding(x).view(-1, 2, 4, 4)).sum()


class Transposed(nn.Module):
    """The same weight as a Linear and as a Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 12)
        self.conv1d = Conv1D(12, 8)
        self.conv1d.weight.data = self.linear.weight.data.t().clone()
        self.conv1d.bias.data = self.linear.bias.data.clone()


def net(kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(11)
    return kind().eval()


def conv1d_computes_what_linear_does(config) -> None:
    """PEFT has no Conv1D for these methods, so the Linear, which is checked against PEFT, is the oracle."""
    both = [get_peft_model(net(Transposed), config.replace(target_modules=[name])) for name in ("linear", "conv1d")]
    disturb(both[0], 0.2)
    state = get_peft_model_state_dict(both[0])
    set_peft_model_state_dict(both[1], {key.replace("linear", "conv1d"): value for key, value in state.items()})
    linear, conv1d = both[0].get_base_model().linear, both[1].get_base_model().conv1d
    x = torch.randn(5, 8)
    close(conv1d(x), linear(x))
    assert (linear(x) - linear.base_layer(x)).abs().max() > 0.01
    for model in both:
        model.merge_adapter()
    close(conv1d(x), linear(x))


class WithoutPeft(MethodTests):
    """The invariants alone, for what PEFT cannot adapt."""

    adds = False
    test_saved_here_loads_in_peft = None
    test_saved_in_peft_loads_here = None
    test_the_config_file_says_what_peft_says = None
    test_ten_steps_give_the_losses_of_peft = None

    def test_peft_cannot(self, make, case):
        with pytest.raises((TypeError, ValueError), match="not supported"):
            peft.get_peft_model(make(case[0]), self.oracle(**case[1]))


class TestOFT(MethodTests):
    config, oracle = OFTConfig, peft.OFTConfig
    learning_rate = 3e-3
    adds = False  # PEFT's forward turns by the first adapter first, its merge by the last: see below
    cases = [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "oft_block_size": 8}),
        ("llama", {"target_modules": ["v_proj"], "r": 2, "oft_block_size": 0, "modules_to_save": ["lm_head"]}),
        ("llama", {"target_modules": ["embed_tokens", "o_proj"], "oft_block_size": 4, "use_cayley_neumann": False}),
        ("t5", {"target_modules": ["q", "wo"], "oft_block_size": 8, "block_share": True}),
        ("t5", {"target_modules": ["v"], "oft_block_size": 8, "coft": True, "eps": 0.3, "num_cayley_neumann_terms": 3}),
        ("bert", {"target_modules": ["query", "dense"], "oft_block_size": 8, "bias": "all"}),
        ("bert", {"target_modules": ["query"], "oft_block_size": 16, "bias": "oft_only", "task_type": "SEQ_CLS"}),
    ]


class TestOFTConv1D(WithoutPeft):
    config, oracle = OFTConfig, peft.OFTConfig
    cases = [("gpt2", {"target_modules": ["c_attn", "c_proj"], "oft_block_size": 8, "bias": "oft_only"})]


class Kernel:
    """What PEFT's CUDA kernel computes; without it, PEFT forces one factor."""

    def forward(self, blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    def backward(self, gradient: Tensor, blocks: Tensor) -> list[Tensor]:
        factors, n, size, _ = blocks.shape
        parts = gradient.view(factors, n, size, n, size)
        return [torch.stack([parts[:, number, :, number] for number in range(n)], dim=1)]


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(peft.tuners.boft.layer, "_FBD_CUDA", Kernel())


@pytest.mark.usefixtures("kernel")
class TestBOFT(MethodTests):
    config, oracle = BOFTConfig, peft.BOFTConfig
    cases = [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "boft_n_butterfly_factor": 3, "boft_block_size": 4}),
        (
            "llama",
            {"target_modules": ["v_proj"], "boft_block_size": 0, "boft_block_num": 2, "modules_to_save": ["lm_head"]},
        ),
        ("t5", {"target_modules": ["q", "wo"], "boft_n_butterfly_factor": 2, "boft_block_size": 8}),
        ("bert", {"target_modules": ["query", "dense"], "boft_n_butterfly_factor": 2, "bias": "all"}),
        ("bert", {"target_modules": ["query"], "bias": "boft_only", "task_type": "SEQ_CLS"}),
    ]


@pytest.mark.usefixtures("kernel")
class TestBOFTConv1D(WithoutPeft):
    config, oracle = BOFTConfig, peft.BOFTConfig
    cases = [("gpt2", {"target_modules": ["c_attn", "c_proj"], "boft_n_butterfly_factor": 2, "bias": "boft_only"})]


class TestHRA(MethodTests):
    config, oracle = HRAConfig, peft.HRAConfig
    cases = [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 4}),
        ("llama", {"target_modules": ["v_proj"], "r": 3, "init_weights": False, "modules_to_save": ["lm_head"]}),
        ("t5", {"target_modules": ["q", "wo"], "r": 4, "apply_GS": True, "init_weights": False}),
        ("bert", {"target_modules": ["query", "dense"], "r": 4, "bias": "all"}),
        ("bert", {"target_modules": ["query"], "r": 6, "bias": "hra_only", "task_type": "SEQ_CLS"}),
    ]


class TestHRAConv1D(WithoutPeft):
    config, oracle = HRAConfig, peft.HRAConfig
    cases = [("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 4, "bias": "hra_only"})]


class TestRoad(MethodTests):
    config, oracle = RoadConfig, peft.RoadConfig
    cases = [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "group_size": 8}),
        (
            "llama",
            {"target_modules": ["v_proj"], "group_size": 16, "variant": "road_4", "modules_to_save": ["lm_head"]},
        ),
        ("t5", {"target_modules": ["q", "wo"], "group_size": 4, "variant": "road_2"}),
        ("bert", {"target_modules": ["query", "dense"], "group_size": 8, "variant": "road_4"}),
        ("bert", {"target_modules": ["query"], "group_size": 32, "task_type": "SEQ_CLS"}),
    ]


class TestRoadConv1D(WithoutPeft):
    config, oracle = RoadConfig, peft.RoadConfig
    cases = [("gpt2", {"target_modules": ["c_attn", "c_proj"], "group_size": 8, "variant": "road_2"})]


CONFIGS = [
    OFTConfig(oft_block_size=4),
    OFTConfig(oft_block_size=4, use_cayley_neumann=False),
    BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3),
    HRAConfig(r=4),
    HRAConfig(r=4, apply_GS=True),
    RoadConfig(group_size=4),
]


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_conv1d_computes_what_the_linear_does(config):
    conv1d_computes_what_linear_does(config)


# --- orthogonality, in fp64 ---


@pytest.mark.parametrize(
    "config",
    [
        OFTConfig(oft_block_size=4, use_cayley_neumann=False, init_weights=False),
        BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3, init_weights=False),
        HRAConfig(r=3, init_weights=False),
        HRAConfig(r=3, init_weights=False, apply_GS=True),
    ],
    ids=repr,
)
def test_rotations_are_orthogonal(config):
    kind = {"OFT": OFT, "BOFT": BOFT, "HRA": HRA}[config.peft_type]
    adapter = kind.create(nn.Linear(16, 4, dtype=torch.float64), config, "linear", None)
    one = torch.eye(16, dtype=torch.float64)
    R = adapter.turned(one)
    torch.testing.assert_close(R @ R.T, one, atol=1e-12, rtol=0)
    torch.testing.assert_close(adapter.turned(one, transposed=True), R.T, atol=1e-12, rtol=0)
    assert (R - one).abs().max() > 0.01


# --- where PEFT is wrong ---


def test_two_rotations_merge_to_what_they_compute_which_pefts_do_not(make, tmp_path):
    settings = {"target_modules": ["q_proj", "down_proj"], "oft_block_size": 8}
    ours = get_peft_model(make(), OFTConfig(**settings), "a")
    ours.add_adapter("b", OFTConfig(**settings))
    ours.set_adapter(["a", "b"])
    disturb(ours, 0.2)
    ours.eval().save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "a", "a").eval()
    theirs.load_adapter(tmp_path / "b", "b")
    theirs.base_model.set_adapter(["a", "b"])
    unmerged = outputs(theirs, "llama")
    theirs.merge_adapter(["a", "b"])
    merged = outputs(theirs, "llama")
    assert (merged - unmerged).abs().max() > 1e-3
    close(outputs(ours, "llama"), merged, atol=3e-5)


@pytest.mark.parametrize("p", [0.5, 0.25])
def test_dropout_leaves_blocks_unrotated_in_training_only(p):
    """PEFT builds OFT's dropout and never calls it."""
    adapter = OFT.create(
        nn.Linear(32, 4), OFTConfig(oft_block_size=4, module_dropout=p, init_weights=False), "linear", None
    )
    x = torch.randn(3, 32)
    kept = (adapter.train().before(x) != x).view(3, 8, 4).all(-1)
    assert (kept.sum(1) == 8 - int(8 * p)).all()
    assert torch.equal(kept[0], kept[1])
    assert (adapter.eval().before(x) != x).all()
    merged = adapter.merged_weight(torch.ones(4, 32), nn.Linear(32, 4))
    assert torch.equal(adapter.train().merged_weight(torch.ones(4, 32), nn.Linear(32, 4)), merged)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("config", "oracle"),
    [
        (OFTConfig(oft_block_size=3), None),
        (OFTConfig(oft_block_size=6, block_share=True), None),
        (BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=1), peft.BOFTConfig),
        (HRAConfig(r=4), peft.HRAConfig),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_convolutions(config, oracle, tmp_path):
    """PEFT's OFT adds overlapping patches up, so that its forward is not its merged layer; there is no oracle of it."""
    config = config.replace(target_modules=["conv"])
    ours = get_peft_model(net(), config)
    disturb(ours, 0.1)
    ours.eval().save_pretrained(tmp_path)
    layer = ours.get_base_model().conv
    x = torch.randn(3, 2, 9, 9)
    expected = layer(x)
    assert (expected - layer.base_layer(x)).abs().max() > 0.01
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path).eval()
    merged = peft.PeftModel.from_pretrained(net(), tmp_path).merge_and_unload().conv(x)
    close(merged, expected)
    if oracle is not None:
        close(theirs.base_model.model.conv(x), expected)
    else:
        assert (theirs.base_model.model.conv(x) - merged).abs().max() > 0.01
    ours.merge_adapter()
    close(layer(x), expected)


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("first", [True, False])
def test_beside_another_method_the_merged_layer_is_what_it_computes(config, first):
    """Also with a trained bias, which a scale or a rotation of the output that comes later changes too."""
    lora = LoraConfig(r=2, target_modules=["linear"], bias="lora_only")
    configs = [config.replace(target_modules=["linear"]), lora]
    ours = get_peft_model(net(Transposed), configs[1 - first], "a")
    ours.add_adapter("b", configs[first])
    ours.set_adapter(["a", "b"])
    disturb(ours, 0.3)
    layer, x = ours.get_base_model().linear, torch.randn(5, 8)
    together = layer(x)
    ours.merge_adapter()
    close(layer(x), together)


@pytest.mark.parametrize("config", [OFTConfig(oft_block_size=3), BOFTConfig(boft_block_size=3), HRAConfig()], ids=repr)
def test_two_adapters_on_a_convolution_and_one_per_row(config):
    config = config.replace(target_modules=["conv"])
    ours = get_peft_model(net(), config, "a")
    ours.add_adapter("b", config)
    ours.set_adapter(["a", "b"])
    disturb(ours, 0.1)
    layer = ours.get_base_model().conv
    x = torch.randn(2, 2, 9, 9)
    together = layer(x)
    ours.merge_adapter()
    close(layer(x), together)
    ours.unmerge_adapter()
    alone = []
    for name in ("b", "a"):
        ours.set_adapter(name)
        alone.append(layer(x))
    with ours._rows(["b", "a"]):
        close(layer(x), torch.stack([alone[0][0], alone[1][1]]))


def test_grouped_convolutions_are_refused():
    for config in (OFTConfig(), BOFTConfig(), HRAConfig()):
        model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
        with pytest.raises(AdapterError, match="in groups"):
            get_peft_model(model, config.replace(target_modules=["0"]))


# --- settings ---


@pytest.mark.parametrize("settings", [{"oft_block_size": 20}, {"r": 7, "oft_block_size": 0}, {"oft_block_size": 64}])
def test_oft_sizes_that_do_not_divide_become_those_of_peft_with_a_warning(make, tmp_path, settings):
    settings |= {"target_modules": ["q_proj", "down_proj"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(make(), peft.OFTConfig(**settings)).eval()
        disturb(theirs, 0.05)
        theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="does not divide the 48 inputs of down_proj"):
        ours = PeftModel.from_pretrained(make(), tmp_path)
    close(outputs(ours, "llama"), outputs(theirs, "llama"))


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        (OFTConfig, {"r": 4}, "r is 4; it must be 0 if oft_block_size .32. is not"),
        (OFTConfig, {"oft_block_size": 0}, "r is 0"),
        (OFTConfig, {"num_cayley_neumann_terms": 1}, "must be at least 2"),
        (BOFTConfig, {"boft_block_num": 4}, "boft_block_num is 4"),
        (BOFTConfig, {"boft_n_butterfly_factor": 0}, "must be at least 1"),
        (HRAConfig, {"r": 0}, "must be at least 1"),
        (RoadConfig, {"variant": "road_3"}, "'road_1', 'road_2', 'road_4'"),
        (RoadConfig, {"group_size": 5}, "must be even"),
    ],
)
def test_wrong_settings_are_refused(config, settings, words):
    with pytest.raises(AdapterError, match=words):
        config(**settings)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BOFTConfig(boft_block_size=5), "32 inputs of .*q_proj.*Block sizes that do: 1, 2, 4, 8, 16, 32"),
        (BOFTConfig(boft_block_size=3, boft_n_butterfly_factor=2), "Block sizes that do: 2, 4, 8, 16"),
        (BOFTConfig(boft_block_size=0, boft_block_num=7), "boft_block_num=7"),
        (BOFTConfig(boft_n_butterfly_factor=9), "Use fewer butterfly factors"),
        (HRAConfig(r=40, apply_GS=True), "Set r to 32 or less"),
        (RoadConfig(), "group_size=64 does not divide the 32 outputs of .*q_proj.*Set group_size to 32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(make, config, words):
    model = make()
    with pytest.raises(AdapterError, match=f"(?s){words}"):
        get_peft_model(model, config.replace(target_modules=["q_proj"]))
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)


def test_road_needs_pairs():
    with pytest.raises(AdapterError, match="An odd number has no pairs"):
        get_peft_model(nn.Sequential(nn.Linear(4, 7)), RoadConfig(target_modules=["0"]))


# --- first weights ---


@pytest.mark.parametrize(
    "config", [OFTConfig(oft_block_size=8), BOFTConfig(), HRAConfig(), RoadConfig(group_size=8)], ids=repr
)
def test_it_starts_without_a_change(make, config):
    ours = get_peft_model(make(), config.replace(target_modules=["q_proj", "down_proj"])).eval()
    close(outputs(ours, "llama"), outputs(make(), "llama"), atol=1e-6)


def test_hra_starts_with_the_values_of_peft(make):
    for settings in ({"r": 4}, {"r": 4, "init_weights": False}):
        torch.manual_seed(0)
        theirs = peft.get_peft_model(make(), peft.HRAConfig(target_modules=["q_proj"], **settings))
        torch.manual_seed(0)
        ours = get_peft_model(make(), HRAConfig(target_modules=["q_proj"], **settings))
        expected = peft.get_peft_model_state_dict(theirs)
        state = get_peft_model_state_dict(ours)
        assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_hra_says_what_starts_changed(make):
    with pytest.warns(UserWarning, match="r=3 is odd"):
        get_peft_model(make(), HRAConfig(r=3, target_modules=["q_proj"]))


def test_gram_schmidt_starts_well_defined(make):
    """Pairs of equal vectors have no orthogonal basis; PEFT's default start is rounding noise or nan."""
    ours = get_peft_model(make(), HRAConfig(apply_GS=True, target_modules=["q_proj"])).eval()
    for layer in ours.get_base_model().model.layers:
        u = layer.self_attn.q_proj.adapters["default"].hra_u
        assert torch.linalg.cond(u / u.norm(dim=0)) < 100


def test_coft_keeps_the_rotation_small_while_training():
    adapter = OFT.create(
        nn.Linear(32, 4), OFTConfig(oft_block_size=8, coft=True, eps=0.01, init_weights=False), "linear", None
    )
    wild = adapter.oft_R.detach().clone()
    adapter.eval().before(torch.randn(2, 32))
    assert torch.equal(adapter.oft_R, wild)
    rotated = adapter.turned(torch.eye(32))
    adapter.train().before(torch.randn(2, 32))
    assert adapter.oft_R.norm() * 2**0.5 <= 0.0101
    torch.testing.assert_close(adapter.turned(torch.eye(32)), rotated)
