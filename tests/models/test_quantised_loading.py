"""Models loaded in 4 and 8 bits: what is quantised, how large it is, what it says, and training an adapter on it."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from nbtune.errors import ModelError, SpecError
from nbtune.models import describe, load, weights
from nbtune.models import loader as loader_module
from nbtune.modules.quantised import dequantised, is_quantised, kind, merged_layer
from nbtune.peft import LoraConfig, get_peft_model
from nbtune.plan import plan
from nbtune.spec import ModelSpec, RunSpec

KINDS = {
    "nf4": {"load_in_4bit": True},
    "nf4, double": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "8-bit": {"load_in_8bit": True},
}


def spec(name="smollm2-135m-instruct", **settings) -> ModelSpec:
    return ModelSpec(name=str(name), **settings)


def held_bytes(model: nn.Module) -> int:
    """What the weights take, with the scales of quantised ones."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    for module in model.modules():
        if is_quantised(module) and kind(module) == "8-bit":
            total += module.weight.SCB.nbytes
        elif is_quantised(module):
            state = module.weight.quant_state
            total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return total


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory, tiny_folder):
    """The tiny Llama with rows of whole blocks of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide") / "tiny-llama"
    shutil.copytree(tiny_folder, folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=64, num_attention_heads=4, num_key_value_heads=2, attention_bias=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


# Settings


def test_both_at_once():
    with pytest.raises(SpecError, match=r"load_in_4bit.*load_in_8bit"):
        RunSpec.from_dict({"model": {"load_in_4bit": True, "load_in_8bit": True}})
    with pytest.raises(SpecError, match="load_in_8bit"):
        RunSpec().updated(load_in_4bit=True, load_in_8bit=True)


def test_full_training_of_quantised_weights():
    with pytest.raises(SpecError, match=r"full.*load_in_4bit"):
        RunSpec.from_dict({"model": {"load_in_4bit": True}, "method": "full"})


def test_settings_travel(tmp_path):
    made = RunSpec(model=spec(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True))
    (tmp_path / "spec.yaml").write_text(made.to_yaml())
    assert RunSpec.from_yaml(tmp_path / "spec.yaml") == made


# A tiny model


@pytest.mark.parametrize("name", KINDS)
def test_what_is_quantised(tiny_folder, name):
    loaded = load(spec(tiny_folder, dtype="bfloat16", **KINDS[name]), device="cpu", for_training=True)
    plain = load(spec(tiny_folder, dtype="bfloat16"), device="cpu").model
    for path, module in loaded.model.named_modules():
        assert is_quantised(module) == (isinstance(module, nn.Linear) and path != "lm_head")
        if is_quantised(module):
            assert kind(module) == ("8-bit" if name == "8-bit" else f"4-bit {name[:3]}")
            weight = plain.get_submodule(path).weight.float()
            limit = {"8-bit": 0.01, "fp4": 0.16}.get(name, 0.12)
            assert (dequantised(module, torch.float32) - weight).norm() / weight.norm() < limit
    assert loaded.model.lm_head.weight.dtype is torch.bfloat16
    assert loaded.model.get_input_embeddings().weight.dtype is torch.bfloat16
    assert loaded.model.device == torch.device("cpu")
    assert loaded.model.config._attn_implementation == "nbtune_packed"


def test_rows_that_bitsandbytes_reads_wrongly(tiny_folder, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = shutil.copytree(tiny_folder, tmp_path / "narrow")
    sizes = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"q_proj.* 96 ") as caught:
        load(spec(folder, load_in_4bit=True), device="cpu")
    assert "load_in_8bit" in caught.value.remedy
    load(spec(folder, load_in_8bit=True), device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["nf4", "8-bit"])
def test_precision_of_the_computation(tiny_folder, name, dtype):
    loaded = load(spec(tiny_folder, dtype=dtype, **KINDS[name]), device="cpu")
    seen = set()
    for module in loaded.model.modules():
        if is_quantised(module):
            module.register_forward_hook(lambda module, args, out: seen.update({args[0].dtype, out.dtype}))
    with torch.no_grad():
        loaded.model(torch.arange(2, 20)[None])
    assert seen == {getattr(torch, dtype)}


def test_exactness_survives_an_evaluation(tiny_folder):
    model = load(spec(tiny_folder, load_in_4bit=True), device="cpu").model
    before = {path: dequantised(module) for path, module in model.named_modules() if is_quantised(module)}
    with torch.no_grad():
        model.eval()(torch.arange(2, 20)[None])
    for path, weight in before.items():
        assert torch.equal(dequantised(model.get_submodule(path)), weight)


def test_memory_check_counts_the_smaller_weights(tiny_folder, monkeypatch):
    full, half, quarter = (weights.memory(tiny_folder, 2, quantised_bytes) for quantised_bytes in (None, 1.0, 0.5625))
    assert quarter < half < full
    monkeypatch.setattr(loader_module, "available_memory", lambda device: half)
    with pytest.raises(ModelError, match="load_in_4bit"):
        load(spec(tiny_folder, dtype="bfloat16"), device="cpu")
    load(spec(tiny_folder, dtype="bfloat16", load_in_8bit=True), device="cpu")


@pytest.mark.slow
def test_nothing_is_printed(tiny_folder):
    """Neither at import nor by an 8-bit layer, which would log each cast of its input."""
    program = (
        "import sys, torch, nbtune; from nbtune.models import load; from nbtune.spec import ModelSpec\n"
        "for bits in ('load_in_4bit', 'load_in_8bit'):\n"
        "    model = load(ModelSpec(name=sys.argv[1], **{bits: True}), device='cpu').model\n"
        "    model.eval()(torch.arange(2, 9)[None])\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(tiny_folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


# The packaged model


@pytest.fixture(scope="module")
def plain():
    return load(spec(dtype="bfloat16"), device="cpu")


@pytest.mark.parametrize("name", ["nf4", "nf4, double", "8-bit"])
def test_packaged_model(plain, name):
    settings = spec(dtype="bfloat16", **KINDS[name])
    loaded = load(settings, device="cpu")
    info = describe(settings)
    assert held_bytes(loaded.model) == pytest.approx(info.weight_bytes(2, settings.quantised_bytes), rel=0.01)
    assert held_bytes(loaded.model) < {"nf4": 0.55, "nf4, double": 0.5, "8-bit": 0.75}[name] * held_bytes(plain.model)

    for path, module in loaded.model.named_modules():
        if is_quantised(module):
            weight = plain.model.get_submodule(path).weight.float()
            error = (dequantised(module, torch.float32) - weight).norm() / weight.norm()
            assert error < (0.02 if name == "8-bit" else 0.11)

    ids = plain.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected, logits = plain.model(ids).logits[0, -1], loaded.model(ids).logits[0, -1]
    assert plain.tokenizer.decode(expected.argmax()) == loaded.tokenizer.decode(logits.argmax()) == " Paris"
    answer = loaded.model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1]
    assert loaded.tokenizer.decode(answer) == " Paris"


@pytest.mark.parametrize("name", ["nf4", "8-bit"])
def test_gradients_reach_an_adapter_of_the_packaged_model(name):
    """They are those of a model that is not quantised but has the same weights."""
    loaded = load(spec(dtype="float32", **KINDS[name]), device="cpu")
    ids = loaded.tokenizer("The capital of France is Paris.", return_tensors="pt")["input_ids"]
    gradients = [gradient_after_an_evaluation(loaded.model, ids)]
    for path, module in list(loaded.model.named_modules()):
        if is_quantised(module):
            loaded.model.set_submodule(path, merged_layer(module, dequantised(module), module.bias, torch.float32))
    gradients.append(gradient_after_an_evaluation(loaded.model, ids))
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


def gradient_after_an_evaluation(base: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        model.eval()(input_ids=ids)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    trained = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert len(trained) == 2 * 2 * 30
    gradient = torch.cat([trained[name].flatten() for name in sorted(trained) if "lora_B" in name])
    model.unload()
    return gradient


def test_plan_counts_the_smaller_weights():
    sizes = {name: plan(RunSpec(model=spec(dtype="bfloat16", **KINDS[name]))).parts for name in ("nf4", "8-bit")}
    whole = plan(RunSpec(model=spec(dtype="bfloat16"))).parts
    linear = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    for name, each in (("nf4", 0.5625), ("8-bit", 1.0)):
        assert whole["base weights"] - sizes[name]["base weights"] == linear * (2 - each)
        assert sizes[name]["adapter"] == whole["adapter"] > 0
