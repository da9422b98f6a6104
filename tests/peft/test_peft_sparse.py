"""FourierFT, WaveFT and SHiRA: few values at fixed places, in a basis of frequencies, of wavelets, or in none."""

from __future__ import annotations

import peft
import pytest
import torch
from grid import MethodTests, close, disturb, losses, outputs
from torch import nn

from nbtune.errors import AdapterError
from nbtune.peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from nbtune.peft.configs.sparse import WAVELETS, FourierFTConfig, ShiraConfig, WaveFTConfig


class TestFourierFT(MethodTests):
    config, oracle = FourierFTConfig, peft.FourierFTConfig
    noise, change = 0.5, 1e-4
    learning_rate = 3e-3  # the first weights are large: steps magnify what fp32 rounds away
    cases = [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "n_frequency": 50}),
        ("llama", {"target_modules": ["v_proj"], "n_frequency": 30, "scaling": 20.0, "modules_to_save": ["lm_head"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "n_frequency": 40, "bias": "fourier_only"}),
        ("gpt2", {"target_modules": ["c_fc"], "n_frequency": 1000, "random_loc_seed": 5}),
        ("t5", {"target_modules": ["q", "wo"], "n_frequency": 40, "n_frequency_pattern": {"wo": 90}}),
        ("bert", {"target_modules": ["query", "dense"], "n_frequency": 40, "init_weights": True}),
    ]


class TestWaveFT(MethodTests):
    config, oracle = WaveFTConfig, peft.WaveFTConfig
    noise = 0.02
    cases = [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "n_frequency": 50}),
        (
            "llama",
            {"target_modules": ["v_proj"], "n_frequency": 30, "wavelet_family": "sym4", "modules_to_save": ["lm_head"]},
        ),
        (
            "gpt2",
            {"target_modules": ["c_attn", "c_proj"], "n_frequency": 60, "wavelet_family": "db3", "bias": "waveft_only"},
        ),
        ("gpt2", {"target_modules": ["c_fc"], "n_frequency": 90, "proportional_parameters": True}),
        (
            "t5",
            {"target_modules": ["q", "wo"], "n_frequency": 40, "n_frequency_pattern": {"wo": 90}, "use_idwt": False},
        ),
        (
            "bert",
            {"target_modules": ["query", "dense"], "n_frequency": 60, "wavelet_family": "coif2", "init_weights": False},
        ),
        ("bert", {"target_modules": ["query", "dense"], "n_frequency": 60, "proportional_parameters": True}),
    ]


class TestShira(MethodTests):
    config, oracle = ShiraConfig, peft.ShiraConfig
    constants = (".shira_indices",)
    cases = [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 4}),
        ("llama", {"target_modules": ["v_proj"], "r": 2, "random_seed": 11, "modules_to_save": ["lm_head"]}),
        ("t5", {"target_modules": ["q", "wo"], "r": 3}),
        ("bert", {"target_modules": ["query", "dense"], "r": 4, "init_weights": False}),
    ]


def on_linear(config, out_features=9, in_features=7, dtype=torch.float64):
    """The adapter on a lone linear layer, in fp64, with random values; and that layer."""
    torch.manual_seed(0)
    base = nn.Linear(in_features, out_features, dtype=dtype)
    model = get_peft_model(nn.Sequential(base), config.replace(target_modules=["0"]))
    disturb(model, 1.0)
    return model.base_model.model[0].adapters["default"], base


SPARSE = {
    "fourierft": FourierFTConfig(n_frequency=12),
    "haar": WaveFTConfig(n_frequency=12),
    "sym5": WaveFTConfig(n_frequency=12, wavelet_family="sym5"),
    "no transform": WaveFTConfig(n_frequency=12, use_idwt=False),
    "shira": ShiraConfig(r=1),
}


@pytest.mark.parametrize("sizes", [(40, 36), (37, 41), (36, 41)])
@pytest.mark.parametrize("config", SPARSE.values(), ids=list(SPARSE))
def test_a_few_tokens_go_through_the_basis_and_many_through_the_dense_update(config, sizes):
    adapter, base = on_linear(config, *sizes)
    delta = adapter.delta_weight(base)
    assert delta.shape == base.weight.shape
    assert delta.abs().max() > 1e-3
    for tokens in (1, 3, 200):
        x = torch.randn(tokens, sizes[1], dtype=torch.float64, requires_grad=True)
        out, expected = adapter(x, base(x), base), base(x) + x @ delta.T
        close(out, expected, atol=1e-10)
        to = torch.randn_like(out)
        gradients = [
            torch.autograd.grad((y * to).sum(), (adapter.values, x), retain_graph=True) for y in (out, expected)
        ]
        for mine, theirs in zip(*gradients, strict=True):
            close(mine, theirs, atol=1e-8)


def test_a_few_tokens_never_see_a_dense_update(monkeypatch):
    for config in SPARSE.values():
        adapter, base = on_linear(config, 200, 160)
        monkeypatch.setattr(type(adapter), "delta_weight", None)
        adapter(torch.randn(2, 160, dtype=torch.float64), torch.zeros(2, 200, dtype=torch.float64), base)


@pytest.mark.parametrize("seed", [0, 777, 2**40 + 1])
@pytest.mark.parametrize("sizes", [(9, 7), (300, 1000)])
def test_the_places_are_those_of_peft(seed, sizes):
    def make():
        return nn.Sequential(nn.Linear(sizes[1], sizes[0]))

    pairs = [(FourierFTConfig, peft.FourierFTConfig, "indices"), (WaveFTConfig, peft.WaveFTConfig, "waveft_indices")]
    for ours, theirs, name in pairs:
        settings = {"target_modules": ["0"], "n_frequency": 20, "random_loc_seed": seed}
        settings |= {"use_idwt": False} if ours is WaveFTConfig else {}
        expected = getattr(peft.get_peft_model(make(), theirs(**settings)).base_model.model[0], name)["default"]
        adapter = get_peft_model(make(), ours(**settings)).base_model.model[0].adapters["default"]
        assert torch.equal(adapter.places, expected)


@pytest.mark.parametrize("seed", [None, 0, 5])
def test_the_entries_of_shira_are_those_of_peft_and_in_its_order(seed):
    settings = {"target_modules": ["0"], "r": 2, "random_seed": seed}
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(30, 40)), peft.ShiraConfig(**settings))
    ours = get_peft_model(nn.Sequential(nn.Linear(30, 40)), ShiraConfig(**settings))
    stored = get_peft_model_state_dict(ours)["base_model.model.0.shira_indices"]
    assert torch.equal(stored, theirs.base_model.model[0].shira_indices["default"])
    assert stored.dtype is torch.int32


def test_the_inverse_wavelet_transform_keeps_lengths():
    """With the places of a signal that fits, the basis is orthonormal: Haar needs no margin."""
    adapter, base = on_linear(WaveFTConfig(n_frequency=40 * 36, scaling=1.0), 40, 36)
    close(adapter.delta_weight(base).norm(), adapter.values.norm(), atol=1e-10)


@pytest.mark.parametrize("sizes", [(16, 12), (15, 12), (16, 13), (15, 13)])
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_wavelets_on_odd_sizes_are_as_in_peft(wavelet, sizes, tmp_path):
    settings = {"target_modules": ["0"], "n_frequency": 100, "wavelet_family": wavelet, "init_weights": False}
    base = nn.Sequential(nn.Linear(sizes[1], sizes[0]))
    state = base.state_dict()
    theirs = peft.get_peft_model(base, peft.WaveFTConfig(**settings))
    theirs.save_pretrained(tmp_path)
    again = nn.Sequential(nn.Linear(sizes[1], sizes[0]))
    again.load_state_dict({key.replace("0.base_layer.", "0."): value for key, value in state.items()})
    x = torch.randn(4, sizes[1])
    close(PeftModel.from_pretrained(again, tmp_path)(x), theirs(x))


@pytest.mark.parametrize("wavelet", ["coif5", "db11", "sym11"])
def test_wavelets_that_fail_in_peft_are_refused_at_once(wavelet):
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(64, 64)), peft.WaveFTConfig(target_modules=["0"], n_frequency=9, wavelet_family=wavelet)
    )
    with pytest.raises((ValueError, RuntimeError)):
        theirs(torch.randn(1, 64))
    with pytest.raises(AdapterError, match=r"wavelet_family is .* must be one of 'db1'"):
        WaveFTConfig(wavelet_family=wavelet)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (FourierFTConfig(n_frequency=64), "n_frequency asks for 64.\nSet n_frequency to at most 63"),
        (WaveFTConfig(n_frequency=64), "n_frequency asks for 64.\nSet n_frequency to at most 63"),
        (ShiraConfig(r=4), "r asks for 64.\nSet r to at most 3"),
    ],
)
def test_more_values_than_entries_are_refused(config, says):
    base = nn.Sequential(nn.Linear(7, 9))
    with pytest.raises(AdapterError, match=f"0 is 9 x 7, 63 entries; {says}"):
        get_peft_model(base, config.replace(target_modules=["0"]))
    assert type(base[0]) is nn.Linear


def test_shira_changes_its_entries_and_no_other():
    adapter, base = on_linear(ShiraConfig(r=2), 30, 40)
    changed = adapter.merged_weight(base.weight, base) != base.weight
    assert changed.sum() == 2 * 70
    assert changed[tuple(adapter.places)].all()


def test_shira_on_conv1d_which_peft_refuses(make):
    settings = {"target_modules": ["c_attn"], "r": 2, "init_weights": False}
    with pytest.raises(TypeError, match="not supported"):
        peft.get_peft_model(make("gpt2"), peft.ShiraConfig(**settings))
    ours = get_peft_model(make("gpt2"), ShiraConfig(**settings)).eval()
    expected = outputs(ours, "gpt2")
    assert (expected - outputs(make("gpt2"), "gpt2")).abs().max() > 1e-3
    ours.merge_adapter()
    close(outputs(ours, "gpt2"), expected)
    ours.unmerge_adapter()
    seen = losses(ours, "gpt2", 1e-2)
    assert seen[-1] < seen[0]


def test_shira_takes_the_entries_of_a_file_with_a_mask_of_its_own(make, tmp_path):
    config = peft.ShiraConfig(target_modules=["q_proj"], r=2, mask_type="diagonals", init_weights=False)

    def diagonals(base_layer, r, **kwargs):
        mask = torch.zeros(base_layer.weight.numel(), dtype=torch.bool)
        mask[: r * sum(base_layer.weight.shape)] = True
        return mask.view(base_layer.weight.shape)

    config.mask_fn = diagonals
    theirs = peft.get_peft_model(make(), config).eval()
    theirs.save_pretrained(tmp_path)
    close(outputs(PeftModel.from_pretrained(make(), tmp_path), "llama"), outputs(theirs, "llama"))
    with pytest.raises(AdapterError, match="mask_type is 'diagonals'; it must be 'random'"):
        ShiraConfig(mask_type="diagonals")


def test_shira_refuses_indices_outside_the_weight(make):
    ours = get_peft_model(make(), ShiraConfig(target_modules=["q_proj"], r=2))
    tensors = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(ours).items()}
    tensors["base_model.model.model.layers.0.self_attn.q_proj.shira_indices"][1, 3] = 32
    with pytest.raises(AdapterError, match="not all places in a weight of 32 x 32"):
        set_peft_model_state_dict(ours, tensors)


def test_settings_that_peft_lacks_are_written_as_names(make, tmp_path):
    """PEFT's ShiraConfig cannot exclude modules or choose layers: it would pass over the settings."""
    config = ShiraConfig(
        target_modules=["q_proj", "o_proj", "down_proj"], exclude_modules=["o_proj"], layers_to_transform=[1], r=2
    )
    ours = get_peft_model(make(), config).eval()
    disturb(ours, 0.1)
    ours.save_pretrained(tmp_path)
    assert not any(".0." in key or "o_proj" in key for key in get_peft_model_state_dict(ours))
    assert not {"exclude_modules", "layers_to_transform"} & peft.PeftConfig.from_pretrained(tmp_path).to_dict().keys()
    close(outputs(peft.PeftModel.from_pretrained(make(), tmp_path).eval(), "llama"), outputs(ours, "llama"))


def test_rows_with_other_seeds_wavelets_and_sizes(make):
    configs = {
        "a": WaveFTConfig(n_frequency=40, target_modules=["q_proj"]),
        "b": WaveFTConfig(n_frequency=40, target_modules=["q_proj"], random_loc_seed=1),
        "c": WaveFTConfig(n_frequency=40, target_modules=["q_proj"], use_idwt=False),
        "d": WaveFTConfig(n_frequency=30, target_modules=["q_proj"], wavelet_family="db2"),
    }
    ours = get_peft_model(make(), configs["a"], "a").eval()
    for name in "bcd":
        ours.add_adapter(name, configs[name])
    disturb(ours, 0.05)
    rows = ["d", "b", "a", "c"]
    expected = []
    for row, name in enumerate(rows):
        ours.set_adapter(name)
        expected.append(outputs(ours, "llama")[row])
    close(outputs(ours, "llama", adapter_names=rows), torch.stack(expected))
