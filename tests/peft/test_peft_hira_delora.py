"""HiRA, which multiplies the weight by a low-rank factor, and DeLoRA, whose update is bounded by the weight's norms."""

from __future__ import annotations

import peft
import pytest
import torch
from grid import MethodTests, close, disturb, outputs
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nbtune.errors import AdapterError
from nbtune.modules import quantised
from nbtune.peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from nbtune.peft.configs.low_rank import DeloraConfig, HiraConfig
from nbtune.peft.configs.rotations import BOFTConfig, HRAConfig, OFTConfig, RoadConfig
from nbtune.peft.methods.delora import Delora
from nbtune.peft.methods.hira import Hira


class TestHira(MethodTests):
    config, oracle = HiraConfig, peft.HiraConfig
    noise = 0.2
    cases = [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 4}),
        ("llama", {"target_modules": ["embed_tokens", "v_proj"], "r": 4, "init_weights": "gaussian"}),
        ("llama", {"target_modules": ["v_proj"], "r": 4, "modules_to_save": ["lm_head"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 4}),
        ("t5", {"target_modules": ["q", "wo"], "r": 4}),
        ("bert", {"target_modules": ["query", "dense"], "r": 4, "task_type": "SEQ_CLS"}),
    ]


class TestDelora(MethodTests):
    config, oracle = DeloraConfig, peft.DeloraConfig
    constants = ("delora_w_norm",)
    learning_rate = 3e-3
    cases = [
        (
            "llama",
            {"target_modules": ["q_proj", "down_proj"], "r": 4, "rank_pattern": {"down_proj": 3}, "delora_lambda": 2},
        ),
        ("llama", {"target_modules": ["v_proj"], "r": 4, "delora_lambda": 2, "modules_to_save": ["lm_head"]}),
        ("t5", {"target_modules": ["q", "wo"], "r": 4, "delora_lambda": 3, "lambda_pattern": {"wo": 1}}),
        ("bert", {"target_modules": ["query", "dense"], "r": 4, "delora_lambda": 2, "bias": "all"}),
        (
            "bert",
            {"target_modules": ["query"], "r": 4, "delora_lambda": 2, "bias": "delora_only", "task_type": "SEQ_CLS"},
        ),
    ]


class TestDeloraConv1D(MethodTests):
    """PEFT has no DeLoRA on Conv1D: the invariants alone."""

    config, oracle = DeloraConfig, peft.DeloraConfig
    constants = ("delora_w_norm",)
    adds = False
    cases = [("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 4, "delora_lambda": 2, "bias": "delora_only"})]
    test_saved_here_loads_in_peft = None
    test_saved_in_peft_loads_here = None
    test_the_config_file_says_what_peft_says = None
    test_ten_steps_give_the_losses_of_peft = None

    def test_peft_cannot(self, make, case):
        with pytest.raises(TypeError, match="not supported"):
            peft.get_peft_model(make(case[0]), self.oracle(**case[1]))


class Net(nn.Module):
    """One of each kind of convolution, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.conv1 = nn.Conv1d(2, 4, 3, stride=2)
        self.conv2 = nn.Conv2d(2, 4, 3, padding=1, dilation=2)
        self.conv3 = nn.Conv3d(2, 4, 2)


def net() -> Net:
    torch.manual_seed(11)
    return Net().eval()


LAYERS = [
    ("conv1", lambda: torch.randn(3, 2, 9)),
    ("conv2", lambda: torch.randn(3, 2, 9, 9)),
    ("conv3", lambda: torch.randn(3, 2, 4, 4, 4)),
    ("embedding", lambda: torch.randint(20, (3, 5))),
]


@pytest.mark.parametrize(("name", "inputs"), LAYERS, ids=lambda value: value if isinstance(value, str) else "")
def test_hira_on_other_layers(name, inputs, tmp_path):
    config = HiraConfig(r=2, target_modules=[name], init_weights=False)
    ours = get_peft_model(net(), config, "a")
    ours.add_adapter("b", config)
    ours.eval().save_pretrained(tmp_path)
    layer, x = getattr(ours.get_base_model(), name), inputs()
    alone = {}
    for adapter in ("a", "b"):
        theirs = peft.PeftModel.from_pretrained(net(), tmp_path / adapter).eval()
        ours.set_adapter(adapter)
        alone[adapter] = layer(x)
        close(getattr(theirs.base_model.model, name)(x), alone[adapter])
        assert (alone[adapter] - layer.base_layer(x)).abs().max() > 0.1
    with ours._rows(["b", "a", "__base__"]):
        close(layer(x), torch.stack([alone["b"][0], alone["a"][1], layer.base_layer(x)[2]]))
    ours.set_adapter(["a", "b"])
    together = layer(x)
    close(together, alone["a"] + alone["b"] - layer.base_layer(x))
    ours.merge_adapter()
    close(layer(x), together)


def test_hiras_rank_pattern_is_heeded_which_pefts_is_not(make):
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 3}}
    for model, r in (
        (get_peft_model(make(), HiraConfig(**settings)), 3),
        (peft.get_peft_model(make(), peft.HiraConfig(**settings)), 4),
    ):
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        assert [shape[0] for key, shape in shapes.items() if "down_proj" in key and "hira_A" in key] == [r] * 3


def test_the_rank_of_hiras_update_is_the_product_of_the_ranks():
    linear = nn.Linear(20, 30, bias=False, dtype=torch.float64)
    linear.weight.data = torch.randn(30, 4, dtype=torch.float64) @ torch.randn(4, 20, dtype=torch.float64)
    adapter = Hira.create(linear, HiraConfig(r=3, init_weights=False), "linear", None)
    delta = adapter.delta_weight(linear)
    assert torch.linalg.matrix_rank(delta) == 12
    torch.testing.assert_close(delta, linear.weight * (adapter.hira_B @ adapter.hira_A))


def test_deloras_update_is_bounded_by_lambda():
    """|dW N^-1| <= lambda whatever A and B are; with r = 1 it is lambda."""
    linear = nn.Linear(20, 30, dtype=torch.float64)
    for r in (1, 5):
        adapter = Delora.create(linear, DeloraConfig(r=r, delora_lambda=7, init_weights=False), "linear", None)
        adapter.delora_B.data *= 1000
        relative = adapter.delta_weight(linear) / linear.weight.norm(dim=0)
        assert relative.norm() <= 7 + 1e-9
        if r == 1:
            torch.testing.assert_close(relative.norm(), torch.tensor(7.0, dtype=torch.float64))
        x, y = torch.randn(4, 20, dtype=torch.float64), torch.zeros(4, 30, dtype=torch.float64)
        torch.testing.assert_close(adapter(x, y, linear), x @ adapter.delta_weight(linear).T)


def test_a_conv1d_computes_what_the_linear_does():
    linear, conv1d = nn.Linear(8, 12), Conv1D(12, 8)
    conv1d.weight.data = linear.weight.data.t().clone()
    for kind, config in ((Hira, HiraConfig(r=3, init_weights=False)), (Delora, DeloraConfig(r=3, init_weights=False))):
        torch.manual_seed(0)
        one = kind.create(linear, config, "", None)
        torch.manual_seed(0)
        other = kind.create(conv1d, config, "", None)
        x, y = torch.randn(5, 8), torch.randn(5, 12)
        close(other(x, y.clone(), conv1d), one(x, y.clone(), linear))
        close(other.merged_weight(linear.weight, conv1d), one.merged_weight(linear.weight, linear))


@pytest.mark.parametrize(
    ("config", "oracle"),
    [
        (HiraConfig(r=4), peft.HiraConfig),
        (HiraConfig(r=4, init_weights="gaussian"), peft.HiraConfig),
        (HiraConfig(r=4, init_weights=False), peft.HiraConfig),
        (DeloraConfig(r=4), peft.DeloraConfig),
        (DeloraConfig(r=4, init_weights=False), peft.DeloraConfig),
    ],
    ids=repr,
)
def test_first_weights_have_the_spread_of_pefts(make, config, oracle):
    settings = {"r": config.r, "init_weights": config.init_weights, "target_modules": ["q_proj", "down_proj"]}
    theirs = peft.get_peft_model_state_dict(peft.get_peft_model(make(), oracle(**settings)))
    ours = get_peft_model_state_dict(get_peft_model(make(), type(config)(**settings)))
    assert ours.keys() == theirs.keys()
    for name in {key.rpartition(".")[2] for key in ours}:
        mine, expected = (
            torch.cat([v.flatten() for key, v in state.items() if key.endswith(name)]) for state in (ours, theirs)
        )
        torch.testing.assert_close(mine.std(), expected.std(), rtol=0.15, atol=1e-6)
        torch.testing.assert_close(mine.mean(), expected.mean(), rtol=0.01, atol=0.2 * expected.std().item() + 1e-6)


def test_deloras_norms_are_those_of_the_base_it_was_trained_on(make, tmp_path):
    settings = {"target_modules": ["q_proj"], "delora_lambda": 2, "init_weights": False}
    theirs = peft.get_peft_model(make(), peft.DeloraConfig(**settings)).eval()
    theirs.save_pretrained(tmp_path)
    other = make()
    for layer in other.model.layers:
        layer.self_attn.q_proj.weight.data *= 2
    ours = PeftModel.from_pretrained(other, tmp_path)
    expected = peft.get_peft_model_state_dict(theirs)
    assert all(torch.equal(value, expected[key]) for key, value in get_peft_model_state_dict(ours).items())


@pytest.mark.parametrize(
    ("kind", "config"), [(Hira, HiraConfig(r=2, hira_dropout=0.5)), (Delora, DeloraConfig(r=2, module_dropout=0.5))]
)
def test_dropout_is_of_the_input_and_in_training_only(kind, config):
    linear = nn.Linear(6, 4)
    adapter = kind.create(linear, config.replace(init_weights=False), "", None)
    x, y = torch.randn(3, 6), torch.zeros(3, 4)
    torch.manual_seed(0)
    inside: Tensor = adapter.train()(x, y, linear)
    torch.manual_seed(0)
    close(inside, nn.functional.dropout(x, 0.5) @ adapter.delta_weight(linear).T)
    close(adapter.eval()(x, y, linear), x @ adapter.delta_weight(linear).T)


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        (HiraConfig, {"r": 0}, "must be at least 1"),
        (HiraConfig, {"init_weights": "normal"}, "must be one of True, False, 'gaussian', None"),
        (HiraConfig, {"hira_dropout": 1.0}, "must be less than 1"),
        (HiraConfig, {"rank_pattern": {"q_proj": 0}}, "must be more than 0"),
        (DeloraConfig, {"delora_lambda": 0}, "must be more than 0"),
        (DeloraConfig, {"lambda_pattern": {"q_proj": -1}}, "must be more than 0"),
        (DeloraConfig, {"bias": "lora_only"}, "'delora_only'"),
    ],
)
def test_wrong_settings_are_refused(config, settings, words):
    with pytest.raises(AdapterError, match=words):
        config(**settings)


def test_hira_refuses_grouped_convolutions():
    with pytest.raises(AdapterError, match="in 2 groups"):
        get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), HiraConfig(target_modules=["0"]))


@pytest.mark.parametrize("config", [HiraConfig(r=4), DeloraConfig(r=4)], ids=repr)
def test_it_starts_without_a_change(make, config):
    ours = get_peft_model(
        make(), config.replace(target_modules=["q_proj", "embed_tokens"][: 1 + isinstance(config, HiraConfig)])
    )
    assert torch.equal(outputs(ours.eval(), "llama"), outputs(make(), "llama"))
    disturb(ours, 0.2)
    assert (outputs(ours, "llama") - outputs(make(), "llama")).abs().max() > 1e-3


QUANTISED = [
    OFTConfig(),
    BOFTConfig(boft_n_butterfly_factor=3),
    HRAConfig(),
    RoadConfig(variant="road_4"),
    HiraConfig(r=8),
    DeloraConfig(delora_lambda=10),
]


@pytest.mark.parametrize("kind", ["4-bit", "8-bit"])
@pytest.mark.parametrize("config", QUANTISED, ids=lambda config: config.peft_type)
def test_a_quantised_layer_is_adapted_as_the_weight_that_it_holds(config, kind):
    """PEFT reads the codes as weights for HRA."""
    bnb = quantised.bitsandbytes()
    if kind == "4-bit":
        layer = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=torch.float32)
    else:
        layer = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False)
    layer = layer.to("cpu").requires_grad_(False).eval()
    plain = nn.Linear(128, 64)
    plain.weight.data, plain.bias.data = quantised.dequantised(layer).clone(), layer.bias.data.clone()
    config = config.replace(target_modules=["0"], init_weights=False)
    models = [get_peft_model(nn.Sequential(base), config) for base in (plain, layer)]
    disturb(models[0], 0.05)
    set_peft_model_state_dict(models[1], get_peft_model_state_dict(models[0]))
    expected, held = (model.eval().get_base_model()[0] for model in models)
    x = torch.randn(16, 128)
    with torch.no_grad():
        wanted = expected(x)
        assert (held(x) - wanted).norm() / wanted.norm() < (1e-3 if kind == "4-bit" else 0.02)
        assert (plain(x) - wanted).norm() / wanted.norm() > 0.1
        models[1].merge_adapter()
        assert (held(x) - wanted).norm() / wanted.norm() < 0.01
