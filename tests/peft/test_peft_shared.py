"""LoHa, LoKr, VeRA, RandLoRA and VB-LoRA: products of small matrices, and matrices that all layers share."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from grid import MethodTests, close, disturb, losses, outputs
from torch import nn
from torch.nn import functional as F

from nbtune.errors import AdapterError
from nbtune.modules import quantised
from nbtune.peft import PeftModel, get_peft_model, get_peft_model_state_dict
from nbtune.peft.configs.low_rank import LoHaConfig, LoKrConfig
from nbtune.peft.configs.shared import RandLoraConfig, VBLoRAConfig, VeraConfig
from nbtune.peft.methods.lokr import LoKr, factors

bnb = quantised.bitsandbytes()


class TestLoHa(MethodTests):
    config, oracle = LoHaConfig, peft.LoHaConfig
    noise = 0.3
    cases = [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 3, "rank_pattern": {"down_proj": 2}}),
        (
            "llama",
            {"target_modules": ["v_proj"], "r": 8, "modules_to_save": ["lm_head"]},
        ),  # r^2 is more than the dense update
        ("t5", {"target_modules": ["q", "wo"], "r": 4, "alpha": 6, "alpha_pattern": {"wo": 20}}),
        ("bert", {"target_modules": ["query", "dense"], "r": 4, "task_type": "SEQ_CLS"}),
    ]


class TestLoKr(MethodTests):
    config, oracle = LoKrConfig, peft.LoKrConfig
    noise = 0.2
    cases = [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 2, "rank_pattern": {"down_proj": 3}}),
        ("llama", {"target_modules": ["v_proj"], "r": 1, "decompose_both": True, "init_weights": "lycoris"}),
        ("llama", {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]}),
        ("t5", {"target_modules": ["q", "wo"], "decompose_factor": 16, "alpha": 6, "alpha_pattern": {"wo": 20}}),
        ("bert", {"target_modules": ["query", "dense"], "decompose_factor": 3, "r": 2, "task_type": "SEQ_CLS"}),
    ]


class TestVera(MethodTests):
    config, oracle = VeraConfig, peft.VeraConfig
    constants = ("vera_A", "vera_B")
    cases = [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 16, "save_projection": False}),
        ("llama", {"target_modules": ["k_proj", "up_proj"], "r": 8, "modules_to_save": ["lm_head"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 8, "bias": "vera_only", "projection_prng_key": 7}),
        ("t5", {"target_modules": ["q", "wo"], "r": 8, "d_initial": 0.2}),
        ("bert", {"target_modules": ["query", "dense"], "r": 8, "bias": "all"}),
        ("bert", {"target_modules": ["query"], "r": 8, "task_type": "SEQ_CLS"}),
    ]


class TestRandLora(MethodTests):
    config, oracle = RandLoraConfig, peft.RandLoraConfig
    constants = ("randlora_A", "randlora_B")
    noise = 0.002
    learning_rate = 1e-3
    cases = [
        ("llama", {"target_modules": ["q_proj", "down_proj", "up_proj"], "r": 5, "randlora_alpha": 50}),
        ("llama", {"target_modules": ["k_proj", "gate_proj"], "r": 8, "randlora_alpha": 80, "save_projection": False}),
        ("llama", {"target_modules": ["v_proj"], "r": 8, "randlora_alpha": 80, "modules_to_save": ["lm_head"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 8, "randlora_alpha": 80, "bias": "randlora_only"}),
        ("t5", {"target_modules": ["q", "wo"], "r": 8, "randlora_alpha": 80, "sparse": True}),
        (
            "bert",
            {"target_modules": ["query", "dense"], "r": 8, "randlora_alpha": 80, "bias": "all", "very_sparse": True},
        ),
        ("bert", {"target_modules": ["query"], "r": 8, "randlora_alpha": 80, "task_type": "SEQ_CLS"}),
    ]


class TestVBLoRA(MethodTests):
    config, oracle = VBLoRAConfig, peft.VBLoRAConfig
    noise = 0.3
    cases = [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "num_vectors": 20, "vector_length": 16}),
        ("llama", {"target_modules": ["v_proj"], "num_vectors": 9, "vector_length": 8, "modules_to_save": ["lm_head"]}),
        (
            "gpt2",
            {"target_modules": ["c_attn", "c_proj"], "num_vectors": 20, "vector_length": 16, "bias": "vblora_only"},
        ),
        ("t5", {"target_modules": ["q", "wo"], "num_vectors": 20, "vector_length": 8, "topk": 3}),
        ("bert", {"target_modules": ["query", "dense"], "num_vectors": 20, "vector_length": 16, "bias": "all"}),
        ("bert", {"target_modules": ["query"], "num_vectors": 20, "vector_length": 4, "task_type": "SEQ_CLS"}),
    ]


def both(base: nn.Module, ours, theirs, **settings) -> tuple[PeftModel, peft.PeftModel]:
    """The same base with a new adapter of each library; the second one's draws are its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (
            get_peft_model(copy.deepcopy(base), ours(**settings)).eval(),
            peft.get_peft_model(copy.deepcopy(base), theirs(**settings)).eval(),
        )


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def adapter_of(model: PeftModel, path: str):
    return model.get_submodule(f"base_model.model.{path}.adapters.default")


# LoHa and LoKr: layers that PEFT does not serve, convolutions, dropouts


@pytest.mark.parametrize(
    ("ours", "theirs"), [(LoHaConfig, peft.LoHaConfig), (LoKrConfig, peft.LoKrConfig)], ids=["loha", "lokr"]
)
class TestLycoris:
    def test_a_transposed_layer_is_adapted_as_if_it_were_not(self, ours, theirs, make, tmp_path):
        """PEFT refuses transformers' Conv1D: its own result for the same model with plain linear layers."""
        with pytest.raises(TypeError):
            peft.get_peft_model(make("gpt2"), theirs(target_modules=["c_attn"]))
        adapted = get_peft_model(make("gpt2"), ours(target_modules=["c_attn", "c_proj"], r=3))
        disturb(adapted, 0.3)
        adapted.eval().save_pretrained(tmp_path)
        plain = make("gpt2")
        for path, module in list(plain.named_modules()):
            if path.endswith(("c_attn", "c_proj")):
                linear = nn.Linear(*module.weight.shape)
                linear.load_state_dict({"weight": module.weight.t(), "bias": module.bias})
                plain.set_submodule(path, linear)
        expected = outputs(peft.PeftModel.from_pretrained(plain, tmp_path).eval(), "gpt2")
        close(outputs(adapted, "gpt2"), expected)
        assert (expected - outputs(make("gpt2"), "gpt2")).abs().max() > 1e-3
        adapted.merge_adapter()
        close(outputs(adapted, "gpt2"), expected, atol=2e-5)

    @pytest.mark.parametrize("effective", [False, True])
    @pytest.mark.parametrize("r", [2, 8])
    @pytest.mark.parametrize(
        "layer",
        [
            nn.Conv1d(4, 12, 3, padding=1),
            nn.Conv1d(4, 12, 1, bias=False),
            nn.Conv2d(4, 12, 3, stride=2),
            nn.Conv2d(4, 12, (1, 3), groups=2, dilation=2),
            nn.Conv2d(4, 12, 1),
        ],
        ids=["1d", "1d, 1", "2d", "2d, groups", "2d, 1"],
    )
    def test_convolutions(self, ours, theirs, layer, r, effective, tmp_path):
        settings = {"target_modules": ["0"], "r": r, "use_effective_conv2d": effective}
        base = nn.Sequential(copy.deepcopy(layer))
        x = torch.randn(5, 4, *[9] * len(layer.kernel_size))
        here, there = both(base, ours, theirs, **settings)
        disturb(here, 0.5)
        disturb(there, 0.5, seed=6)
        here.save_pretrained(tmp_path / "here")
        there.save_pretrained(tmp_path / "there")
        with torch.no_grad():
            for mine, oracle in (
                (here, peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "here").eval()),
                (PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "there"), there),
            ):
                expected = oracle(x)
                close(mine(x), expected, atol=2e-5)
                assert (expected - base(x)).abs().max() > 1e-2
                mine.merge_adapter()
                close(mine(x), expected, atol=2e-5)
                mine.unmerge_adapter()
            here.add_adapter("b", ours(**settings))
            mixed = here(x, adapter_names=["default", "__base__", "b", "default", "b"])
            close(mixed[0], here(x)[0])
            close(mixed[1], base(x)[1])

    def test_a_convolution_in_three_dimensions(self, ours, theirs):
        base = nn.Sequential(nn.Conv3d(4, 6, (1, 2, 3)))
        x = torch.randn(2, 4, 5, 5, 5)
        for effective in (False, True):
            model = get_peft_model(copy.deepcopy(base), ours(target_modules=["0"], r=1, use_effective_conv2d=effective))
            disturb(model, 0.5)
            with torch.no_grad():
                expected = model(x)
                model.merge_adapter()
                close(model(x), expected, atol=2e-5)
                assert (expected - base(x)).abs().max() > 1e-2

    def test_module_dropout_drops_the_whole_update(self, ours, theirs):
        base = nn.Sequential(nn.Linear(6, 4))
        model = get_peft_model(copy.deepcopy(base), ours(target_modules=["0"], r=2, module_dropout=0.25))
        disturb(model, 0.5)
        x = torch.randn(3, 6)
        with torch.no_grad():
            whole, none = model.eval()(x), base(x)
            model.train()
            seen = [model(x) for _ in range(800)]
        dropped = [torch.equal(y, none) for y in seen]
        assert all(torch.allclose(y, whole) for y, gone in zip(seen, dropped, strict=True) if not gone)
        assert 0.2 < sum(dropped) / len(seen) < 0.3

    def test_rank_dropout_drops_rows_of_the_update(self, ours, theirs):
        """By the same law in both libraries, but PEFT gives nan where it drops all rows and scales up the rest."""
        for scale in [True] if ours is LoHaConfig else [False, True]:
            more = {} if ours is LoHaConfig else {"rank_dropout_scale": scale}
            settings = {"target_modules": ["0"], "r": 2, "rank_dropout": 0.5, **more}
            x = torch.ones(1, 6)
            for model in both(nn.Sequential(nn.Linear(6, 8)), ours, theirs, **settings):
                disturb(model, 0.5)
                with torch.no_grad():
                    with model.disable_adapter():
                        none = model(x)
                    whole = model.eval()(x) - none
                    model.train()
                    seen = torch.cat([(model(x) - none) / whole for _ in range(400)])
                if isinstance(model, PeftModel):
                    assert seen.isfinite().all()
                seen = seen[seen.isfinite().all(-1)]
                kept = (seen.abs() > 1e-3).float()
                factor = 8 / kept.sum(-1, keepdim=True).clamp_min(1) if scale else 1.0
                torch.testing.assert_close(seen, kept * factor, atol=2e-3, rtol=1e-3)
                assert 0.45 < kept.mean() < 0.55

    def test_rows_in_training_are_dropped_apart(self, ours, theirs):
        model = get_peft_model(nn.Sequential(nn.Linear(6, 64)), ours(target_modules=["0"], r=2, rank_dropout=0.5))
        model.add_adapter("b", ours(target_modules=["0"], r=2, rank_dropout=0.5))
        disturb(model, 0.5)
        with torch.no_grad():
            y = model.train()(torch.ones(2, 6), adapter_names=["default", "b"])
            base = model(torch.ones(2, 6), adapter_names=["__base__"] * 2)
        gone = (y - base).abs() < 1e-6
        assert 10 < gone[0].sum() < 54
        assert not torch.equal(gone[0], gone[1])

    def test_the_patterns_of_ranks_and_alphas(self, ours, theirs, make):
        settings = {"rank_pattern": {"layers.1.*q_proj": 1}, "alpha_pattern": {"q_proj": 3}}
        model = get_peft_model(make(), ours(target_modules=["q_proj", "o_proj"], r=2, alpha=8, **settings))
        scalings = [
            adapter_of(model, f"model.layers.{n}.self_attn.{name}").scaling
            for n in (0, 1)
            for name in ("q_proj", "o_proj")
        ]
        assert scalings == [1.5, 4, 3, 4]


def test_loha_is_cheaper_factored_and_the_same():
    """FedPara's proposition: rank up to r^2. In fp64 the factored forward is the dense one."""
    for r, size in ((2, 24), (4, 24)):  # the second is past the point where the dense update is cheaper
        layer = nn.Linear(size, size + 4, bias=False).double()
        model = get_peft_model(nn.Sequential(layer), LoHaConfig(target_modules=["0"], r=r, init_weights=False)).double()
        adapter, x = adapter_of(model, "0"), torch.randn(7, size).double()
        delta = adapter.delta_weight(layer)
        assert torch.linalg.matrix_rank(delta) == min(r * r, size)
        torch.testing.assert_close(adapter.linear(x), F.linear(x, delta), atol=1e-12, rtol=1e-10)


def test_lokr_never_builds_the_update_of_a_linear_layer(monkeypatch):
    layer = nn.Linear(24, 36).double()
    for settings in ({"r": 1, "decompose_both": True}, {"r": 2}, {"r": 8}, {"decompose_factor": 2, "r": 3}):
        config = LoKrConfig(target_modules=["0"], init_weights=False, **settings)
        model = get_peft_model(nn.Sequential(layer), config).double()
        adapter, x = adapter_of(model, "0"), torch.randn(2, 7, 24).double()
        expected = F.linear(x, adapter.delta_weight(layer))
        with monkeypatch.context() as patch:
            patch.setattr(LoKr, "delta_weight", None)
            torch.testing.assert_close(model(x) - layer(x), expected, atol=1e-12, rtol=1e-10)
        model.unload()


def test_the_sizes_of_lokr_are_those_of_peft():
    from peft.tuners.lokr.layer import factorization

    for size in (1, 2, 7, 12, 36, 127, 360, 4096, 14336):
        for factor in (-1, 1, 2, 4, 5, 7, 8, 16, 100, 5000):
            assert factors(size, factor) == factorization(size, factor), (size, factor)


def test_a_factor_of_zero_is_refused():
    for factor in (0, -2):
        with pytest.raises(AdapterError, match="decompose_factor"):
            LoKrConfig(decompose_factor=factor)


# VeRA and RandLoRA: matrices from a seed


def test_the_projections_of_vera_are_those_of_peft_bit_for_bit(make):
    for seed in (0, 123):
        settings = {"target_modules": ["q_proj", "up_proj"], "r": 12, "projection_prng_key": seed}
        here, there = both(make(), VeraConfig, peft.VeraConfig, **settings)
        shared = adapter_of(here, "model.layers.0.mlp.up_proj").shared
        assert torch.equal(shared.vera_A, there.base_model.vera_A["default"])
        assert torch.equal(shared.vera_B, there.base_model.vera_B["default"])


@pytest.mark.parametrize("kind", [{}, {"sparse": True}, {"very_sparse": True}, {"r": 7}], ids=str)
def test_the_bases_of_randlora_are_those_of_peft_bit_for_bit(make, kind):
    for seed in (0, 123):
        settings = {"target_modules": ["q_proj", "up_proj"], "projection_prng_key": seed, "r": 8, **kind}
        here, there = both(make(), RandLoraConfig, peft.RandLoraConfig, **settings)
        shared = adapter_of(here, "model.layers.0.mlp.up_proj").shared
        for name in ("randlora_A", "randlora_B"):
            mine, oracle = getattr(shared, name), getattr(there.base_model, name)["default"]
            assert torch.equal(mine.float(), oracle)  # PEFT rounds to bfloat16, and then holds and stores them in fp32
            assert mine.dtype is (torch.float32 if "sparse" in str(kind) else torch.bfloat16)


def test_they_do_not_depend_on_the_default_device_dtype_or_seed():
    layers = {"0": nn.Linear(6, 8)}
    expected = VeraConfig(target_modules=["0"], r=4), RandLoraConfig(target_modules=["0"], r=4)
    from nbtune.peft.methods.randlora import Bases
    from nbtune.peft.methods.vera import Projections

    first = Projections(expected[0], layers), Bases(expected[1], layers)
    torch.manual_seed(77)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            second = Projections(expected[0], layers), Bases(expected[1], layers)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, two in zip(first, second, strict=True):
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, two.state_dict()[name])
            assert tensor.dtype is two.state_dict()[name].dtype


@pytest.mark.parametrize("config", [VeraConfig, RandLoraConfig])
def test_without_the_projections_a_file_is_made_whole_from_the_seed(make, config, tmp_path):
    name = "vera" if config is VeraConfig else "randlora"
    for saved in (True, False):
        settings = {"target_modules": ["q_proj"], "r": 8, "save_projection": saved, "projection_prng_key": 5}
        model = get_peft_model(make(), config(**settings)).eval()
        disturb(model, 0.05)
        model.save_pretrained(tmp_path / str(saved))
        keys = {key for key in stored(tmp_path / str(saved)) if key.endswith(("_A", "_B"))}
        assert keys == ({f"base_model.{name}_A", f"base_model.{name}_B"} if saved else set())
        assert torch.equal(
            outputs(PeftModel.from_pretrained(make(), tmp_path / str(saved)), "llama"), outputs(model, "llama")
        )


def test_randlora_stores_its_bases_once(make, tmp_path):
    """PEFT 0.21.2 stores a copy for each layer; ours reads that file, and PEFT reads ours."""
    here, there = both(make(), RandLoraConfig, peft.RandLoraConfig, target_modules=["q_proj", "v_proj"], r=8)
    here.save_pretrained(tmp_path / "here")
    there.save_pretrained(tmp_path / "there")
    mine, oracle = stored(tmp_path / "here"), stored(tmp_path / "there")
    assert sum(key.endswith("randlora_A") for key in oracle) == 7
    assert [key for key in mine if key.endswith("randlora_A")] == ["base_model.randlora_A"]
    assert mine.keys() < oracle.keys()
    result = PeftModel(make()).load_adapter(tmp_path / "there", "default")
    assert not result.unexpected_keys
    oracle["base_model.model.model.layers.0.self_attn.q_proj.randlora_C"] = torch.zeros(1)
    safetensors.torch.save_file(oracle, tmp_path / "there" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="randlora_C"):
        PeftModel.from_pretrained(make(), tmp_path / "there")


def test_bases_in_half_precision_are_kept_as_they_are(make, tmp_path):
    """PEFT makes fp16 bases on a GPU without bfloat16; in bfloat16 they would lose three bits."""
    model = get_peft_model(make(), RandLoraConfig(target_modules=["q_proj"], r=8))
    model.save_pretrained(tmp_path)
    tensors = stored(tmp_path)
    for name in ("base_model.randlora_A", "base_model.randlora_B"):
        tensors[name] = torch.randn(tensors[name].shape).half()
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    again = stored(tmp_path / "again")
    assert all(
        torch.equal(again[name], tensor) and again[name].dtype is tensor.dtype for name, tensor in tensors.items()
    )


def test_vera_trains_two_vectors_a_layer_and_randlora_a_full_rank():
    base = nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 30))
    vera = get_peft_model(copy.deepcopy(base), VeraConfig(target_modules=["0", "1"], r=16))
    assert vera.get_nb_trainable_parameters()[0] == (12 + 16) + (30 + 16)
    config = RandLoraConfig(target_modules=["0", "1"], r=5, init_weights=False)
    randlora = get_peft_model(copy.deepcopy(base), config)
    for number, layer in enumerate(base):
        delta = adapter_of(randlora, str(number)).delta_weight(layer).double()
        assert torch.linalg.matrix_rank(delta) == 12


@pytest.mark.parametrize("kind", ["4-bit", "8-bit"])
@pytest.mark.parametrize("config", [RandLoraConfig, VeraConfig, VBLoRAConfig, LoHaConfig, LoKrConfig])
def test_merging_into_a_quantised_layer_gives_what_the_layer_gave(config, kind):
    """PEFT multiplies RandLoRA's factors in the wrong order there."""
    make = bnb.nn.Linear4bit if kind == "4-bit" else bnb.nn.Linear8bitLt
    more = {"compute_dtype": torch.float32} if kind == "4-bit" else {"has_fp16_weights": False}
    layer = make(128, 64, **more)
    layer.weight.data = torch.randn(64, 128)
    model = nn.Sequential(layer.to("cpu").requires_grad_(False))
    sizes = {"vector_length": 16, "num_vectors": 20} if config is VBLoRAConfig else {}
    adapted = get_peft_model(model, config(target_modules=["0"], r=8, **sizes))
    disturb(adapted, 3.0 if config is VeraConfig else 0.3)
    x = torch.randn(5, 128)
    with torch.no_grad():
        expected = adapted.eval()(x)
        with adapted.disable_adapter():
            base = adapted(x)
        adapted.merge_adapter()
        error = (adapted(x) - expected).norm()
    assert error < 0.02 * expected.norm()  # of the quantised layer's own product
    assert error < 0.1 * (expected - base).norm()


@pytest.mark.parametrize(
    "config",
    [
        VeraConfig(target_modules=["query"], r=4, bias="vera_only"),
        VBLoRAConfig(target_modules=["query"], vector_length=8, num_vectors=9, bias="vblora_only"),
    ],
    ids=["vera", "vblora"],
)
def test_shared_tensors_are_taken_from_a_gathered_state_dict(make, config):
    model = get_peft_model(make("bert"), config)
    disturb(model, 0.1)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    disturb(model, 0.1, seed=8)
    taken = get_peft_model_state_dict(model, state)
    assert taken.keys() == expected.keys()
    assert all(torch.equal(taken[key], expected[key]) for key in expected)


# VB-LoRA: the small file, and sizes


class TestVBLoRASmallFile:
    settings = {
        "target_modules": ["q_proj", "down_proj"],
        "num_vectors": 20,
        "vector_length": 16,
        "save_only_topk_weights": True,
    }

    @pytest.mark.parametrize("topk", [1, 2, 3])
    @pytest.mark.parametrize("num_vectors", [20, 300])
    def test_it_goes_both_ways(self, make, topk, num_vectors, tmp_path):
        settings = {**self.settings, "topk": topk, "num_vectors": num_vectors}
        here, there = both(make(), VBLoRAConfig, peft.VBLoRAConfig, **settings)
        disturb(here, 0.3)
        disturb(there, 0.3, seed=6)
        here.save_pretrained(tmp_path / "here")
        there.save_pretrained(tmp_path / "there")
        mine, oracle = stored(tmp_path / "here"), stored(tmp_path / "there")
        assert {key: (t.shape, t.dtype) for key, t in mine.items()} == {
            key: (t.shape, t.dtype) for key, t in oracle.items()
        }
        name = "base_model.model.model.layers.0.self_attn.q_proj.vblora_logits_A"
        assert mine[f"{name}_topk_weights"].shape == (4, 2, topk - 1)
        assert mine[f"{name}_topk_indices"].dtype is (torch.uint8 if num_vectors < 256 else torch.int16)
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "here").eval()
        close(outputs(here, "llama"), outputs(theirs, "llama"))
        loaded = PeftModel.from_pretrained(make(), tmp_path / "there")
        close(outputs(loaded, "llama"), outputs(there, "llama"))
        assert (outputs(loaded, "llama") - outputs(make(), "llama")).abs().max() > 1e-3
        loaded.save_pretrained(tmp_path / "again")
        close(outputs(PeftModel.from_pretrained(make(), tmp_path / "again"), "llama"), outputs(there, "llama"))
        loaded.merge_adapter()
        close(outputs(loaded, "llama"), outputs(there, "llama"), atol=2e-5)

    def test_it_can_serve_and_not_be_trained(self, make, tmp_path):
        model = get_peft_model(make(), VBLoRAConfig(**self.settings))
        losses(model, "llama", 1e-2, steps=2)  # the one that was trained can be trained further
        model.save_pretrained(tmp_path)
        losses(model, "llama", 1e-2, steps=1)
        loaded = PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)
        outputs(loaded, "llama")
        with pytest.raises(AdapterError, match="only serve"):
            losses(loaded, "llama", 1e-2, steps=1)

    def test_weights_that_round_to_more_than_one(self, make, tmp_path):
        """PEFT takes the logarithm of the negative rest, and every output is nan."""
        model = get_peft_model(make(), VBLoRAConfig(**self.settings, topk=3))
        model.save_pretrained(tmp_path)
        tensors = stored(tmp_path)
        for key, tensor in tensors.items():
            if key.endswith("weights"):
                tensor.copy_(torch.tensor([0.6, 0.4000001]).expand_as(tensor))
        safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
        assert outputs(peft.PeftModel.from_pretrained(make(), tmp_path).eval(), "llama").isnan().any()
        assert outputs(PeftModel.from_pretrained(make(), tmp_path), "llama").isfinite().all()


def test_a_vector_length_that_does_not_fit_is_named_with_one_that_does(make):
    with pytest.raises(AdapterError, match=r"q_proj has 32 inputs and 32 outputs; vector_length is 24") as caught:
        get_peft_model(make(), VBLoRAConfig(target_modules=["q_proj", "down_proj"], vector_length=24))
    assert "Set vector_length to 16" in str(caught.value)
    get_peft_model(make(), VBLoRAConfig(target_modules=["q_proj", "down_proj"], vector_length=16))
    with pytest.raises(AdapterError, match="topk is 5"):
        VBLoRAConfig(topk=5, num_vectors=4)


def test_all_layers_train_one_bank(make):
    model = get_peft_model(make(), VBLoRAConfig(target_modules=["q_proj", "v_proj"], vector_length=8, num_vectors=9))
    banks = [parameter for name, parameter in model.named_parameters() if "vector_bank" in name]
    assert len(banks) == 1
    assert len({id(module.shared) for module in model.modules() if type(module).__name__ == "VBLoRA"}) == 1
