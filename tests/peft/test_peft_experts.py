"""LoRA on expert parameters against peft's ParamWrapper, with the same tensors."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from nbtune.errors import AdapterError
from nbtune.peft import LoraConfig
from nbtune.peft.layer import ActiveAdapters, AdapterLayer
from nbtune.peft.methods.experts import LoraExperts
from nbtune.peft.rows import Rows

_SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
_SIZES |= {"num_hidden_layers": 2, "max_position_embeddings": 64, "pad_token_id": 0}
_SIX: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 48}
_GROUPS = {"n_group": 2, "topk_group": 1, "n_routed_experts": 8, "first_k_dense_replace": 1, "num_key_value_heads": 4}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
_MAMBA = {"layers_block_type": ["attention", "moe"], "mamba_num_heads": 4, "mamba_head_dim": 8, "head_dim": 8}
_LOCAL: dict[str, Any] = {"num_local_experts": 6, "intermediate_size": 24}
_MIXTURES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, _LOCAL),
    "qwen": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {**_SIX, "num_experts": 6, "head_dim": 8}),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3}),
    "deepseek": (DeepseekV3ForCausalLM, DeepseekV3Config, {**_SIX, **_GROUPS, **_LATENT}),
    "gpt_oss": (GptOssForCausalLM, GptOssConfig, {**_LOCAL, "num_experts_per_tok": 2, "head_dim": 8}),
    "llama4": (
        Llama4ForCausalLM,
        Llama4TextConfig,
        {**_LOCAL, "num_local_experts": 3, "intermediate_size_mlp": 48, "head_dim": 8},
    ),
    "nemotron": (
        NemotronHForCausalLM,
        NemotronHConfig,
        {**_SIX, **_MAMBA, "n_routed_experts": 6, "moe_shared_expert_intermediate_size": 24, "n_group": 1},
    ),
}
_BOTH = ["gate_up_proj", "down_proj"]


@pytest.fixture(scope="module")
def mixtures():
    torch.manual_seed(4)
    models = {name: kind(config(**{**_SIZES, **sizes})).eval() for name, (kind, config, sizes) in _MIXTURES.items()}
    for model in models.values():
        for name, weight in model.named_parameters():
            if ".experts." in name or "router" in name:  # some begin at zero, or uninitialised
                nn.init.normal_(weight, std=0.1)
    return models


@pytest.fixture
def mixture(mixtures):
    return lambda name: copy.deepcopy(mixtures[name])


def _layer(base: nn.Module, *adapters: LoraExperts, rows: tuple[str, ...] = ()) -> AdapterLayer:
    """The engine's layer on an experts module, with adapters of the names 0, 1, ... that are all active."""
    state = ActiveAdapters()
    layer = AdapterLayer(base, state, "experts")
    for number, adapter in enumerate(adapters):
        layer.add(str(number), adapter)
    state.update(active=tuple(layer.adapters))
    state.rows = Rows(rows) if rows else None
    return layer


def _config(parameters: list[str], **settings):
    names = [f"experts.{name}" for name in parameters]
    common = {"r": 4, "lora_alpha": 10, "init_lora_weights": False, **settings}
    return LoraConfig(**common), peft.LoraConfig(target_modules=[], target_parameters=names, **common)


def _reference(model: nn.Module, config: peft.LoraConfig, *names: str) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of patterns without a match
        reference = peft.get_peft_model(copy.deepcopy(model), config, adapter_name=names[0])
        for name in names[1:]:
            reference.add_adapter(name, config)
    return reference.eval()


def _paths(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if name.endswith(".experts") and "down_proj" in dir(module)]


def _ours(model: nn.Module, config: LoraConfig, parameters: list[str], reference: peft.PeftModel, *names: str):
    """Our adapters by module path, one for each name, with the tensors of the reference's."""
    adapters = {}
    for path in _paths(model):
        base = model.get_submodule(path)
        adapters[path] = [LoraExperts.create(base, config, path, parameters) for _ in names]
        for adapter, name in zip(adapters[path], names, strict=True):
            adapter.load(_of_path(peft.get_peft_model_state_dict(reference, adapter_name=name), path))
    assert adapters
    return adapters


def _of_path(tensors: dict[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    prefix = f"base_model.model.{path}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _put(model: nn.Module, adapters: dict[str, list[LoraExperts]], rows: tuple[str, ...] = ()) -> nn.Module:
    for path, some in adapters.items():
        model.set_submodule(path, _layer(model.get_submodule(path), *some, rows=rows))
    return model.eval()


def _grad_of(adapter: LoraExperts) -> dict[str, torch.Tensor]:
    grads = {name: parameter.grad for name, parameter in adapter.named_parameters()}
    return adapter.saved({name: grad for name, grad in grads.items() if grad is not None})


@pytest.mark.parametrize("parameters", [["gate_up_proj"], ["down_proj"], _BOTH], ids="+".join)
@pytest.mark.parametrize("name", [name for name in _MIXTURES if name != "nemotron"])
def test_outputs_gradients_and_files_are_those_of_peft(mixture, ids, name, parameters):
    model = mixture(name)
    settings = {"rank_pattern": {"down_proj": 8}, "alpha_pattern": {"experts.gate_up_proj": 3}}
    config, theirs = _config(parameters, **settings)
    reference = _reference(model, theirs, "default")
    adapters = _ours(model, config, parameters, reference, "default")
    plain = model(input_ids=ids).logits
    _put(model, adapters)
    got, expected = model(input_ids=ids).logits, reference(input_ids=ids).logits
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    theirs_grads = {key: p.grad for key, p in reference.named_parameters() if "lora_" in key}
    state = peft.get_peft_model_state_dict(reference)
    for path, (adapter,) in adapters.items():
        saved = adapter.saved(adapter.own_state())
        of_path = _of_path(state, path)
        assert saved.keys() == of_path.keys()
        assert all(torch.equal(saved[key], of_path[key]) for key in saved)
        for key, grad in _grad_of(adapter).items():
            their_key = f"base_model.model.{path}.{key}".replace(".weight", ".default.weight")
            torch.testing.assert_close(grad, theirs_grads[their_key], atol=2e-5, rtol=1e-4)


def test_experts_without_gate(mixture, ids):
    model = mixture("nemotron")
    config, theirs = _config(["up_proj", "down_proj"])
    reference = _reference(model, theirs, "default")
    _put(model, _ours(model, config, ["up_proj", "down_proj"], reference, "default"))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, reference(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
def test_two_adapters_add_up_and_rows_have_their_own(mixture, ids, name):
    model = mixture(name)
    config, theirs = _config(_BOTH)
    reference = _reference(model, theirs, "one", "two")
    adapters = _ours(model, config, _BOTH, reference, "one", "two")
    tuner: Any = reference.base_model
    expected = {}
    with torch.no_grad():
        expected["none"] = model(input_ids=ids).logits
        for active in ("one", "two", ["one", "two"]):
            tuner.set_adapter(active)
            expected[str(active)] = reference(input_ids=ids).logits
        both = _put(copy.deepcopy(model), adapters)(input_ids=ids).logits
        rows = _put(model, adapters, ("1", "__base__", "0"))(input_ids=ids).logits
    torch.testing.assert_close(both, expected["['one', 'two']"], atol=1e-5, rtol=1e-5)
    for row, name in enumerate(("two", "none", "one")):
        torch.testing.assert_close(rows[row], expected[name][row], atol=1e-5, rtol=1e-5)
    assert (expected["one"] - expected["two"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["qwen", "gpt_oss", "llama4"])
def test_merged_experts_compute_the_same_and_leave_the_base(mixture, ids, name):
    model = mixture(name)
    config, theirs = _config(_BOTH)
    reference = _reference(model, theirs, "default")
    adapters = _ours(model, config, _BOTH, reference, "default")
    before = copy.deepcopy(model.state_dict())
    unmerged = _put(copy.deepcopy(model), adapters)
    merged = copy.deepcopy(model)
    for path, (adapter,) in adapters.items():
        merged.set_submodule(path, adapter.merged_module(merged.get_submodule(path)))
        adapter.merged_module(model.get_submodule(path))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    theirs = reference.merge_and_unload().state_dict()
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, theirs[key], atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, unmerged(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_merge_to_infinity_is_refused(mixture):
    model = mixture("mixtral")
    config, _ = _config(_BOTH)
    base = model.get_submodule(_paths(model)[0])
    adapter = LoraExperts.create(base, config, "experts", _BOTH)
    nn.init.constant_(adapter.lora_B["down_proj"], torch.inf)
    with pytest.raises(AdapterError, match="inf or nan"):
        adapter.merged_module(base)


class _Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operation newly makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        storages = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in storages:
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("r", [4, 3], ids=["kernel", "loop"])
def test_no_tensor_as_large_as_the_experts(mixture, r):
    """In neither direction; peft makes several, which shows that the measurement sees them."""
    model = mixture("mixtral").requires_grad_(False)
    config, theirs = _config(_BOTH, r=r)
    reference = _reference(model, theirs, "default")
    base = model.get_submodule(_paths(model)[0])
    adapter = LoraExperts.create(base, config, "experts", _BOTH)
    x = torch.randn(5, 32, requires_grad=True)
    index, weights = torch.tensor([[0, 1], [3, 0], [5, 3], [0, 5], [1, 3]]), torch.rand(5, 2)
    experts = min(base.gate_up_proj.numel(), base.down_proj.numel())
    with _Largest() as ours:
        _layer(base, adapter)(x, index, weights).sum().backward()
    with _Largest() as peft_s:
        reference.get_submodule(f"base_model.model.{_paths(model)[0]}")(x, index, weights).sum().backward()
    assert ours.numel < experts
    assert peft_s.numel >= base.gate_up_proj.numel()


@pytest.mark.parametrize("r", [4, 3], ids=["kernel", "loop"])
def test_loop_and_kernel_give_the_gradients_of_fp64(mixture, r):
    base = mixture("gpt_oss").get_submodule("model.layers.0.mlp.experts").requires_grad_(False)
    config, _ = _config(_BOTH, r=r)
    adapter = LoraExperts.create(base, config, "experts", _BOTH)
    exact_base, exact = copy.deepcopy(base).double(), copy.deepcopy(adapter).double()
    exact_base.config._experts_implementation = "eager"  # the others have no fp64
    x = torch.randn(7, 32, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    index, weights = torch.randint(0, 6, (7, 2)), torch.rand(7, 2)
    loss = _layer(base, adapter)(x, index, weights).square().sum()
    # The same by the model's own function, with merged weights that carry the gradient.
    state = dict(exact_base.named_parameters())
    for name in _BOTH:
        delta = exact.scaling[name] * (exact.lora_B[name] @ exact.lora_A[name]).mT
        state[name] = state[name] + delta
    out = torch.func.functional_call(exact_base, state, (exact_x, index, weights.double()))
    grads = torch.autograd.grad(loss, [x, *adapter.parameters()])
    exact_grads = torch.autograd.grad(out.square().sum(), [exact_x, *exact.parameters()])
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad.double(), exact_grad, atol=1e-4, rtol=1e-4)


def test_no_tokens_and_half_precision(mixture):
    base = mixture("qwen").get_submodule("model.layers.0.mlp.experts").requires_grad_(False)
    for r in (8, 3):
        adapter = LoraExperts.create(base, _config(_BOTH, r=r)[0], "experts", _BOTH)
        x, index, weights = torch.randn(9, 32), torch.randint(0, 6, (9, 2)), torch.rand(9, 2)
        assert _layer(base, adapter)(x[:0], index[:0], weights[:0]).shape == (0, 32)
        half = copy.deepcopy(base).bfloat16()
        out = _layer(half, adapter)(x.bfloat16(), index, weights)
        assert out.dtype is torch.bfloat16
        assert all(parameter.dtype is torch.float32 for parameter in adapter.parameters())
        exact = _layer(base, adapter)(x, index, weights)
        assert (out - exact).norm() < 0.02 * exact.norm()


def test_reads_the_layout_of_peft_0_18(mixture):
    model = mixture("qwen")
    base = model.get_submodule("model.layers.0.mlp.experts")
    config, _ = _config(_BOTH)
    adapter, other = (LoraExperts.create(base, config, "experts", _BOTH) for _ in range(2))
    # 0.18 took [E, out, in] for [E, in, out]: A [E*r, out], B [in, r*E], delta[e] = A_e^T B_e^T.
    old = {}
    for name, prefix in (("down_proj", ""), ("gate_up_proj", "base_layer.")):
        A, B = torch.randn(6 * 4, base.get_parameter(name).shape[1]), torch.randn(base.get_parameter(name).shape[2], 24)
        old |= {f"{prefix}lora_A.weight": A, f"{prefix}lora_B.weight": B}
        delta = torch.einsum("ore,eri->eio", B.reshape(len(B), -1, 6), A.reshape(6, -1, A.shape[1]))
        expected = base.get_parameter(name) + 10 / 4 * delta
        adapter.load(old)
        torch.testing.assert_close(adapter.merged_module(base).get_parameter(name), expected, atol=1e-5, rtol=1e-5)
    other.load(adapter.saved(adapter.own_state()))
    assert all(torch.equal(value, adapter.state_dict()[key]) for key, value in other.state_dict().items())


def test_square_parameter_follows_the_other(mixture):
    """down_proj [E, 32, 32] fits both layouts; gate_up_proj beside it tells which it is."""
    model = MixtralForCausalLM(MixtralConfig(**{**_SIZES, **_LOCAL, "intermediate_size": 32}))
    base = model.get_submodule(_paths(model)[0])
    adapter = LoraExperts.create(base, _config(_BOTH)[0], "experts", _BOTH)
    square = {"lora_A.weight": torch.randn(24, 32), "lora_B.weight": torch.randn(32, 24)}
    old = {"base_layer.lora_A.weight": torch.randn(24, 64), "base_layer.lora_B.weight": torch.randn(32, 24)}
    new = {"base_layer.lora_A.weight": torch.randn(24, 32), "base_layer.lora_B.weight": torch.randn(64, 24)}
    assert all(torch.equal(value, (square | new)[key]) for key, value in adapter.of_this_layout(square | new).items())
    turned = adapter.of_this_layout(square | old)
    torch.testing.assert_close(turned["lora_A.weight"][:4], square["lora_B.weight"][:, ::6].T)
    torch.testing.assert_close(turned["lora_B.weight"][:, ::6], square["lora_A.weight"][:4].T)


def test_first_weights(mixture):
    base = mixture("mixtral").get_submodule("model.layers.0.mlp.experts")
    config = LoraConfig(r=4)
    adapter = LoraExperts.create(base, config, "experts", ["down_proj"])
    A, B = adapter.lora_A["down_proj"], adapter.lora_B["down_proj"]
    assert A.shape == (6, 4, 24)
    assert B.shape == (6, 32, 4)
    assert not B.any()
    assert 0.95 / 24**0.5 < A.abs().max() <= 1 / 24**0.5
    gaussian = LoraExperts.create(base, config.replace(init_lora_weights="gaussian"), "experts", ["down_proj"])
    assert gaussian.lora_A["down_proj"].std().item() == pytest.approx(1 / 4, rel=0.1)
    assert LoraExperts.create(base.to("meta"), config, "experts", ["down_proj"]).lora_A["down_proj"].is_meta


@pytest.mark.parametrize("setting", [{"lora_dropout": 0.1}], ids=str)
def test_settings_that_experts_cannot_have(mixture, setting):
    base = mixture("mixtral").get_submodule("model.layers.0.mlp.experts")
    with pytest.raises(AdapterError, match="does not go with target_parameters"):
        LoraExperts.create(base, LoraConfig(**setting), "experts", _BOTH)


def test_modules_and_parameters_that_are_not_known(mixture):
    base = mixture("gpt_oss").get_submodule("model.layers.0.mlp.experts")
    with pytest.raises(AdapterError, match=r"experts.gate_up_proj_bias: .* gate_up_proj, down_proj"):
        LoraExperts.create(base, LoraConfig(), "experts", ["gate_up_proj_bias"])
    with pytest.raises(AdapterError, match=r"of a Linear, .* nothing"):
        LoraExperts.create(nn.Linear(4, 4), LoraConfig(), "experts", ["weight"])
    with pytest.raises(AdapterError, match="16 bits"):
        LoraExperts.create(base.to(torch.float8_e4m3fn), LoraConfig(), "experts", _BOTH)
