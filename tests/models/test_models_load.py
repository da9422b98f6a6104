"""Loading and describing: local folders, GGUF files, the packaged model, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from nbtune.errors import ModelError
from nbtune.models import compute_dtype, describe, load, load_tokenizer, machine, skeleton
from nbtune.models import loader as loader_module
from nbtune.spec import ModelSpec


def spec(name: str | Path = "smollm2-135m-instruct", **settings) -> ModelSpec:
    return ModelSpec(name=str(name), **settings)


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def refused(folder: Path, **settings) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load(spec(folder, **settings))
    return caught.value


def test_importing_is_cheap():
    program = (
        "import sys, nbtune.models, nbtune.data\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pandas') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


# A local folder


def test_folder(tiny_folder):
    from transformers.utils import logging

    messages: list[str] = []
    loaded = load(spec(tiny_folder, dtype="float32"), device="cpu", on_status=messages.append)
    assert messages == ["Loading tiny-llama"]
    assert loaded.dtype == loaded.model.dtype == torch.float32
    assert loaded.device == torch.device("cpu")
    assert loaded.tokenizer.pad_token == loaded.tokenizer.eos_token == "</s>"
    assert loaded.model.config._name_or_path == str(tiny_folder)
    assert logging.is_progress_bar_enabled()


def test_models_built_in_two_threads_do_not_get_each_others_precision(tiny_folder):
    """A form draws skeletons while the run that it started loads the weights."""
    done, seen = threading.Event(), set()

    def draw():
        while not done.is_set():
            seen.update(parameter.dtype for parameter in skeleton(spec(tiny_folder)).parameters())

    drawing = threading.Thread(target=draw)
    drawing.start()
    try:
        for _ in range(15):
            loaded = load(spec(tiny_folder, dtype="bfloat16"), device="cpu")
            assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    finally:
        done.set()
        drawing.join()
    assert seen == {torch.float32}
    assert torch.get_default_dtype() is torch.float32


def test_nothing_is_printed(tiny_folder, capfd):
    load(spec(tiny_folder), for_training=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_that_was_asked_for(tiny_folder, dtype):
    loaded = load(spec(tiny_folder, dtype=dtype), device="cpu")
    assert loaded.dtype == loaded.model.dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx2": True}, torch.float32),
        ({"architecture": "aarch64"}, torch.float32),
    ],
)
def test_auto_dtype_of_a_processor(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert compute_dtype("auto", "cpu") == expected


def test_for_training(tiny_folder):
    model = load(spec(tiny_folder), for_training=True).model
    assert model.config.use_cache is False
    assert model.config._attn_implementation == "nbtune_packed"
    assert load(spec(tiny_folder)).model.config._attn_implementation != "nbtune_packed"


def test_describe_folder(tiny_folder):
    info = describe(spec(tiny_folder))
    reference = load(spec(tiny_folder)).model
    assert info.architecture == "LlamaForCausalLM"
    assert info.parameters == sum(p.numel() for p in reference.parameters())
    assert (info.hidden_size, info.layers, info.vocabulary, info.context_length) == (32, 2, 64, 256)
    assert info.dtype == "float32"
    assert not info.tied_embeddings
    assert not info.has_chat_template
    linear = {name: m for name, m in reference.named_modules() if isinstance(m, torch.nn.Linear)}
    assert [module.name for module in info.modules] == list(linear)
    for module in info.modules:
        other = linear[module.name]
        assert (module.in_features, module.out_features) == (other.in_features, other.out_features)
        assert module.bias == (other.bias is not None)
    assert {(m.kind, m.layer) for m in info.modules} >= {("q_proj", 0), ("down_proj", 1), ("lm_head", None)}


# What is refused


def test_pickles_only(tiny_folder, tmp_path):
    folder = copy_of(tiny_folder, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error = refused(folder)
    assert "pickles" in error.title
    assert "pytorch_model.bin" in error.message
    assert "save_pretrained" in error.remedy


def test_missing_weights(tiny_folder, tmp_path):
    folder = copy_of(tiny_folder, tmp_path)
    (folder / "model.safetensors").unlink()
    assert "lacks model.safetensors" in refused(folder).message


def test_missing_shard(tiny_folder, tmp_path):
    folder = copy_of(tiny_folder, tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors" in refused(folder).message


def test_truncated_weights(tiny_folder, tmp_path):
    folder = copy_of(tiny_folder, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    error = refused(folder)
    assert "damaged" in error.title
    assert "model.safetensors" in error.message


def test_unknown_architecture(tiny_folder, tmp_path):
    folder = copy_of(tiny_folder, tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "no-such-model"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "cannot be loaded" in refused(folder).title
    with pytest.raises(ModelError, match="cannot be loaded"):
        describe(spec(folder))


def test_code_of_the_model_is_not_run(tiny_folder, tmp_path):
    folder = copy_of(tiny_folder, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    error = refused(folder)
    assert "brings its own code" in error.title
    assert "trust_remote_code" in error.remedy
    assert not (tmp_path / "ran").exists()


def test_not_enough_memory(tiny_folder, monkeypatch):
    monkeypatch.setattr(loader_module, "available_memory", lambda device: 1000)
    error = refused(tiny_folder, dtype="float32")
    assert "Not enough memory" in error.title
    assert "float32" in error.message
    assert "bfloat16" in error.remedy


def test_memory_of_a_container(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 2000\ninactive_file 500\n")
    whole = machine.available_memory("cpu")
    assert whole > 10_000
    (tmp_path / "memory.max").write_text("5000\n")
    assert machine.available_memory("cpu") == 2500


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_architectures_that_packing_would_mix(kind, tiny_folder, tmp_path):
    from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

    if kind == "bloom":  # its attention cannot be chosen
        model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2))
    else:  # it carries a state
        model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1))
    folder = copy_of(tiny_folder, tmp_path)
    model.save_pretrained(folder)
    load(spec(folder))
    with pytest.raises(ModelError, match=type(model).__name__) as caught:
        load(spec(folder), for_training=True)
    assert "see each other" in caught.value.message


# GGUF files


@pytest.mark.slow
def test_gguf_file(tiny_gguf_file, tiny_cache, monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("NBTUNE_CACHE", str(tiny_cache))
    loaded = load(spec(tiny_gguf_file, dtype="float32"), device="cpu")
    direct = AutoModelForCausalLM.from_pretrained(
        tiny_gguf_file.parent, gguf_file=tiny_gguf_file.name, dtype=torch.float32
    )
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, direct(ids).logits, atol=1e-5, rtol=0)
    loaded.model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert load_tokenizer(spec(tiny_gguf_file))("hello")["input_ids"] == loaded.tokenizer("hello")["input_ids"]


# The packaged model


@pytest.fixture(scope="module")
def smollm():
    return load(spec(dtype="float32"), device="cpu")


def test_packaged_model_answers(smollm):
    messages = [{"role": "user", "content": "What is the capital of France? One word."}]
    ids = smollm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        answer = smollm.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in smollm.tokenizer.decode(answer)
    assert answer[-1] == smollm.tokenizer.eos_token_id == smollm.model.generation_config.eos_token_id
    assert smollm.tokenizer.eos_token == smollm.tokenizer.pad_token == "<|im_end|>"


def test_second_load_is_quick(smollm):
    """1 to 2 s on an idle machine; processor time leaves out what other programs take."""
    start = time.process_time()
    load(spec())
    assert time.process_time() - start < 3


def test_packaged_model_described():
    info = describe(spec())
    assert info.architecture == "LlamaForCausalLM"
    assert info.parameters == 134_515_008
    assert (info.layers, info.hidden_size, info.context_length) == (30, 576, 8192)
    assert info.tied_embeddings
    assert info.has_chat_template
    assert len(info.modules) == 30 * 7 + 1


@pytest.mark.slow
def test_packaged_model_equals_the_gguf(smollm, tmp_path):
    from transformers import AutoModelForCausalLM

    source = smollm.source
    direct = AutoModelForCausalLM.from_pretrained(source.path, gguf_file=source.gguf_file, dtype=torch.float32)
    ids = torch.tensor([smollm.tokenizer("def fibonacci(n):\n    return n if n < 2 else")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(smollm.model(ids).logits, direct(ids).logits, atol=1e-5, rtol=0)
    smollm.model.save_pretrained(tmp_path)
    smollm.tokenizer.save_pretrained(tmp_path)
    again = load(spec(tmp_path, dtype="float32"), device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids).logits, smollm.model(ids).logits, atol=0, rtol=0)
