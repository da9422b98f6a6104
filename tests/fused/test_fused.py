"""Blocks found by structure and computed by kernels: the same logits and gradients as the model alone."""

import copy

import pytest
import torch
import transformers
from torch import nn

from nbtune.fused import fused
from nbtune.kernels.attention import NAME, register
from nbtune.peft import DeloraConfig, IA3Config, LoraConfig, get_peft_model

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
ALL = {"attention": 2, "mlp": 2}
# What is found beside linear layers: norms are two a block and the last one, more where queries and keys have theirs.
ARCHITECTURES = {
    "Llama": ({}, {**ALL, "norm": 5}),
    "Mistral": ({"sliding_window": 4}, {**ALL, "norm": 5}),
    "Qwen2": ({}, {**ALL, "norm": 5}),
    "Qwen3": ({}, {**ALL, "norm": 9}),
    "Gemma": ({}, {**ALL, "norm": 5}),
    "Gemma2": ({"sliding_window": 4, "attn_logit_softcapping": 3.0}, {**ALL, "norm": 9}),
    "Gemma3Text": ({"sliding_window": 4}, {**ALL, "norm": 13}),
    "Cohere": ({}, ALL),  # its norms subtract the mean
    "Granite": ({"attention_multiplier": 0.3, "residual_multiplier": 0.5}, {**ALL, "norm": 5}),
    "Olmo2": ({}, {**ALL, "norm": 9}),
    "SmolLM3": ({"no_rope_layers": [1, 0]}, {**ALL, "norm": 5}),
    "Glm": ({"partial_rotary_factor": 0.5}, {**ALL, "norm": 5}),  # gate and up are one layer
    "Phi3": ({}, {**ALL, "norm": 5}),  # so are queries, keys and values
    "Phi": ({}, {"attention": 2}),  # its MLP has no gate, its norms subtract the mean
    "Ministral": ({"sliding_window": 4}, {**ALL, "norm": 5}),
    "Helium": ({}, {**ALL, "norm": 5}),
    "GptOss": ({"sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2}, {"attention": 2, "norm": 5}),
    "Qwen3Moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        {"attention": 2, "norm": 9},
    ),
}
LENGTHS = [5, 9, 7]


def model_of(name, **sizes):
    register()
    torch.manual_seed(0)
    changes, _ = ARCHITECTURES[name]
    config = getattr(transformers, f"{name}Config")(**SIZES | changes | sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases that are all ones or zeros would hide mistakes
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return model.train()


def inputs():
    borders = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(1, 64, (1, sum(LENGTHS)), generator=generator),
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "use_cache": False,
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
    }


def adapted(name, config=None):
    model = model_of(name)
    peft_model = get_peft_model(model, config or LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model, peft_model.train()


def hidden_states(model):
    return model.get_decoder()(**inputs()).last_hidden_state


def results(model):
    """The last hidden states, and the gradients of their weighted sum by name."""
    hidden = hidden_states(model)
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2), dtype=hidden.dtype)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad((weight * hidden).sum(), list(trained.values()), allow_unused=True)
    return hidden, dict(zip(trained, found, strict=True))


def assert_same(ours, theirs, tolerance=1e-4):
    torch.testing.assert_close(ours[0], theirs[0], rtol=2e-5, atol=2e-5)
    for name, gradient in theirs[1].items():
        if gradient is None:
            assert ours[1][name] is None, name
            continue
        scale = gradient.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(ours[1][name] / scale, gradient / scale, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hidden_states_and_gradients_are_those_of_the_model(name):
    model, _ = adapted(name)
    expected = results(model)
    with fused(model) as blocks:
        found = results(model)
    _, counts = ARCHITECTURES[name]
    assert {kind: count for kind, count in blocks.counts.items() if kind != "linear"} == counts
    assert not blocks.refused or name in ("Cohere", "Phi")
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma2", "Cohere", "Olmo2"])
def test_full_fine_tuning(name):
    model = model_of(name)
    expected = results(model)
    with fused(model):
        assert_same(results(model), expected)


def test_under_autocast_the_blocks_compute_in_its_precision():
    model = model_of("Llama")
    with torch.autocast("cpu", torch.bfloat16):
        expected, of_theirs = results(model)
        with fused(model):
            found, of_ours = results(model)
    assert (found - expected).norm() / expected.norm() < 0.02
    for name, gradient in of_theirs.items():
        if gradient is None:  # the head
            assert of_ours[name] is None
            continue
        assert of_ours[name].dtype is gradient.dtype
        assert (of_ours[name] - gradient).norm() / gradient.norm() < 0.1, name


def test_nothing_is_left_behind():
    model, _ = adapted("Llama")
    before = [(module, dict(vars(module)), module.training) for module in model.modules()]
    with fused(model), pytest.raises(ZeroDivisionError):
        1 / 0  # noqa: B018
    for module, attributes, training in before:
        assert vars(module).keys() == attributes.keys()
        assert module.training == training
        assert not module._forward_hooks
    assert model.config._attn_implementation == NAME


def test_a_block_that_computes_something_else_is_refused_and_still_right():
    model, _ = adapted("Llama")

    class Louder(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
                mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn,
            )  # fmt: skip

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 1.5

    model.model.layers[1].mlp = Louder(model.model.layers[1].mlp)
    expected = results(model)
    with fused(model) as blocks:
        assert list(blocks.refused) == ["model.layers.1.mlp"]
        assert blocks.counts["mlp"] == 1
        assert_same(results(model), expected)


CONFIGS = {
    "ia3": lambda: IA3Config(init_ia3_weights=False),
    "dora": lambda: LoraConfig(target_modules="all-linear", use_dora=True, init_lora_weights=False),
    "pissa": lambda: LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa"),
    "bias": lambda: LoraConfig(r=4, target_modules="all-linear", bias="all", init_lora_weights=False),
    "delora": lambda: DeloraConfig(r=4, target_modules=["gate_proj", "v_proj"], init_weights=False),
    "some modules": lambda: LoraConfig(r=4, target_modules=["up_proj", "k_proj"], init_lora_weights=False),
    "head saved": lambda: LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["input_layernorm"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_other_adapters_compute_as_ever(case):
    model, _ = adapted("Llama", CONFIGS[case]())
    expected = results(model)
    with fused(model):
        assert_same(results(model), expected)


def test_several_adapters_and_switching_while_fused():
    model, peft_model = adapted("Llama")
    peft_model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj", "gate_proj"], init_lora_weights=False))
    peft_model.set_requires_grad(["default", "second"])
    with fused(model):
        for active in ("second", ["default", "second"]):
            peft_model.set_adapter(active)
            found = results(model)
            with fused_off(model):
                assert_same(found, results(model))
        with peft_model.disable_adapter():
            found = hidden_states(model)
    with peft_model.disable_adapter():
        torch.testing.assert_close(found, hidden_states(model), rtol=1e-5, atol=1e-5)


class fused_off:
    """The model's own forward passes inside a `fused`."""

    def __init__(self, model):
        self.bound = {module: module.__dict__.pop("forward") for module in model.modules() if "forward" in vars(module)}

    def __enter__(self):
        assert self.bound

    def __exit__(self, *_):
        for module, forward in self.bound.items():
            module.__dict__["forward"] = forward


def test_dropout_of_adapters_does_not_disturb_the_proof():
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    model, _ = adapted("Llama", config)
    with fused(model) as blocks:
        assert not blocks.refused
        torch.manual_seed(0)
        first = hidden_states(model)
        torch.manual_seed(0)
        assert torch.equal(hidden_states(model), first)
        assert not torch.equal(hidden_states(model), first)


def test_gradient_checkpointing():
    model, _ = adapted("Qwen3")
    expected = results(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with fused(model):
        assert_same(results(model), expected)


def test_on_the_meta_device_blocks_are_found_by_looks():
    model, _ = adapted("Gemma2")
    with fused(model) as blocks:
        expected = blocks.counts
    with torch.device("meta"):
        meta = transformers.AutoModelForCausalLM.from_config(model.config, attn_implementation=NAME)
        get_peft_model(meta, LoraConfig(r=4, target_modules="all-linear"))
    with fused(meta) as blocks:
        assert blocks.counts == expected


def test_dropout_in_an_mlp_is_not_passed_by():
    model, _ = adapted("Llama")
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    with fused(model) as blocks:
        assert blocks.counts["mlp"] == 1


def test_dropout_of_attention_is_not_passed_by():
    model = model_of("Llama", attention_dropout=0.5)
    torch.manual_seed(3)
    expected = hidden_states(model)
    with fused(model) as blocks:
        assert blocks.counts == {"mlp": 2, "norm": 5}
        torch.manual_seed(3)
        torch.testing.assert_close(hidden_states(model), expected, rtol=2e-5, atol=2e-5)
    assert model.model.layers[0].self_attn.training


def test_memory_of_a_block_is_what_the_kernels_save():
    """A Llama block in bf16: x of both norms, their outputs, q k v, the attention's output, gate, up, A x; and in fp32
    one number a row and norm, and one a row and head."""
    model = copy.deepcopy(model_of("Llama")).to(torch.bfloat16)
    get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    seen = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in kept:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    kept = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    T, D, inner, heads, kv = sum(LENGTHS), 32, 48, 32, 16
    with fused(model):
        block = model.model.layers[1]
        cos_sin = model.model.rotary_emb(torch.zeros(1, T, D, dtype=torch.bfloat16), inputs()["position_ids"])
        x = torch.randn(1, T, D, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = block(x, position_embeddings=cos_sin, attention_mask=None, **inputs())
    angles = 2 * 2 * T * 8
    halves = 2 * T * (D + D + heads + 2 * kv + heads + D + D + 2 * inner + 7 * 4)
    logsumexp = 4 * 4 * len(LENGTHS) * 16  # attention counts segments in whole sixteens
    assert y.requires_grad
    assert sum(seen.values()) == halves + 4 * T * 2 + logsumexp + angles
