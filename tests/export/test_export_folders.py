"""Exports that are folders, GGUF LoRA adapters, and what is refused before anything is written."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import adapter
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import nbtune as nt
from nbtune.cli import app
from nbtune.errors import AdapterError, ExportError, NbtuneError, RunError
from nbtune.export import exporter, folders
from nbtune.peft import LoraConfig, PromptTuningConfig
from nbtune.spec import ModelSpec, RunSpec

Folder = Callable[[str], Path]


def run_folder(path: Path, model: ModelSpec, weights: Path | None, method: Any = None) -> Path:
    """A run as training leaves it."""
    path.mkdir(parents=True)
    spec = RunSpec(model=model, data="stdlib-docs", method=method or LoraConfig(r=4))
    (path / "spec.yaml").write_text(spec.to_yaml())
    summary = {"eval_loss_before": 2.5, "eval_loss_after": 1.25, "steps": 20, "train_loss": 1.5}
    (path / "summary.json").write_text(json.dumps(summary))
    if weights is not None:
        shutil.copytree(weights, path / ("model" if method == "full" else "adapter"))
    return path


def test_the_adapter_is_copied(bases: Folder, adapters: Folder, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "runs" / "amber-heron", ModelSpec(name=str(bases("qwen2"))), adapters("qwen2"))
    done = nt.export("amber-heron", "adapter", tmp_path / "out", runs_dir=tmp_path / "runs")
    assert done.proof.largest_difference == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (done.path / name).read_bytes() == (run / "adapter" / name).read_bytes()
    card = (done.path / "README.md").read_text()
    assert "held-out loss after (nats per token) | 1.25" in card
    assert "stdlib-docs" in card
    assert "learning_rate" in card
    assert str(tmp_path) not in card
    assert str(bases("qwen2").parent) not in card
    report = json.loads((done.path / "export.json").read_text())
    assert (report["proved"], report["format"], report["source"]) == (True, "adapter", "amber-heron")
    with pytest.raises(ExportError, match="exists already"):
        nt.export("amber-heron", "adapter", tmp_path / "out", runs_dir=tmp_path / "runs")


def test_merged_after_training_in_4_bits(bases: Folder, adapters: Folder, tmp_path: Path, capsys: Any) -> None:
    spec = ModelSpec(name=str(bases("qwen2")), load_in_4bit=True)
    run = run_folder(tmp_path / "run", spec, adapters("qwen2"))
    done = nt.export(run, "merged", tmp_path / "out")
    assert done.proof.relative_difference < 0.02
    assert done.from_quantised is not None
    assert 0.01 < done.from_quantised.relative_difference < 0.5
    said = capsys.readouterr().out
    assert "proof: largest logit difference" in said
    assert "from the quantised base that it was trained on" in said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is not None
    assert {"generation_config.json", "README.md", "export.json"} <= {path.name for path in done.path.iterdir()}
    assert str(tmp_path) not in (done.path / "config.json").read_text()


def test_merged_in_several_files(adapters: Folder, tmp_path: Path) -> None:
    done = nt.export(adapters("qwen2"), "merged", tmp_path / "out", max_shard_size="50KB")
    shards = sorted(done.path.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]
    assert len(shards) > 3
    header = 4000  # bytes; what is bounded is the tensors
    assert all(shard.stat().st_size < 50_000 + header for shard in shards)
    index = json.loads((done.path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert done.proof.greedy_agree == 48
    one = nt.export(adapters("qwen2"), "merged", tmp_path / "one")
    whole = load_file(one.path / "model.safetensors")
    pieces = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert pieces.keys() == whole.keys()
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)


def test_merged_keeps_what_goes_with_the_model(bases: Folder, adapters: Folder, tmp_path: Path) -> None:
    """How to sample, the template that was trained with, and what the card says of data, settings and metrics."""
    base = Path(shutil.copytree(bases("qwen2"), tmp_path / "base"))
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 4]}
    (base / "generation_config.json").write_text(json.dumps(sampling))
    trained = Path(shutil.copytree(adapters("qwen2"), tmp_path / "trained"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "Question: {{ messages[0].content }}\nAnswer:"
    tokenizer.save_pretrained(trained)
    run = run_folder(tmp_path / "runs" / "amber-heron", ModelSpec(name=str(base)), trained)
    out = nt.export(run, "merged", tmp_path / "out").path
    assert sampling.items() <= json.loads((out / "generation_config.json").read_text()).items()
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    _, head, card = (out / "README.md").read_text().split("---\n", 2)
    assert "library_name: transformers" in head
    for text in ("# amber-heron", "in bf16", "`stdlib-docs`", "(nats per token) | 1.25", "steps | 20", "r: 4"):
        assert text in card
    assert str(tmp_path) not in card


def test_sampling_that_transformers_would_not_save(bases: Folder, adapters: Folder, tmp_path: Path) -> None:
    """Models on the hub state a temperature without do_sample; transformers reads that and refuses to write it."""
    base = Path(shutil.copytree(bases("qwen2"), tmp_path / "base"))
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9}))
    run = run_folder(tmp_path / "run", ModelSpec(name=str(base)), adapters("qwen2"))
    out = nt.export(run, "merged", tmp_path / "out").path
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.6


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to write more bytes than this into a file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("format", "name", "size"),
    [
        ("merged", "out", 100_000),
        ("gguf", "out.gguf", 100_000),
        ("gguf-lora", "out.gguf", 5000),
        ("adapter", "out", 5000),
    ],
)
def test_a_disk_that_is_full_in_mid_write(format: Any, name: str, size: int, adapters: Folder, tmp_path: Path) -> None:
    folder, said = adapters("llama"), f"{name} could not be written\n(.*\n)*Nothing was left behind"
    with largest_file(size), pytest.raises(ExportError, match=said):
        nt.export(folder, format, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_full_fine_tune(bases: Folder, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", ModelSpec(name=str(bases("qwen2"))), bases("qwen2"), "full")
    done = nt.export(run, "merged", tmp_path / "out", dtype="f32")
    assert done.proof.largest_difference == 0
    assert nt.export(run, "gguf", tmp_path / "out.gguf").proof.greedy_agree == 48
    with pytest.raises(ExportError, match="has no adapter"):
        nt.export(run, "gguf-lora", tmp_path / "lora.gguf")


@pytest.mark.parametrize(("format", "name"), [("merged", "out"), ("gguf", "out.gguf")])
def test_a_weight_that_f16_cannot_hold(format: Any, name: str, bases: Folder, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", ModelSpec(name=str(bases("llama"))), bases("llama"), "full")
    weights = run / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = 1e5
    save_file(tensors, weights, {"format": "pt"})
    message = r"do not fit float16\nmodel.layers.1.mlp.down_proj.weight holds 100000; .* is 65504.\nChoose bf16 or f32."
    with pytest.raises(ExportError, match=message):
        nt.export(run, format, tmp_path / name, dtype="f16")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert nt.export(run, format, tmp_path / name, dtype="bf16").proof.greedy_agree > 40


def test_a_broken_merge_fails_the_proof(adapters: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_another(folder: Path, dtype: torch.dtype) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[:] = 0
        return model

    monkeypatch.setattr(folders, "read_merged", read_another)
    with pytest.raises(ExportError, match="does not answer as the adapter does"):
        nt.export(adapters("qwen2"), "merged", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert json.loads((tmp_path / "out" / "export.json").read_text())["proved"] is False


def test_what_cannot_be_read_back(adapters: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, dtype: torch.dtype) -> Any:
        raise ValueError("no such shard")

    monkeypatch.setattr(folders, "read_merged", fail)
    with pytest.raises(ExportError, match="cannot be read back\nValueError: no such shard"):
        nt.export(adapters("qwen2"), "merged", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "export.json").read_text())["proved"] is False


def test_gguf_lora(adapters: Folder, tmp_path: Path) -> None:
    done = nt.export(adapters("llama"), "gguf-lora", tmp_path / "lora.gguf", dtype="f32")
    assert done.proof.relative_difference < 1e-5
    reader = gguf.GGUFReader(done.path)
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.type"] == "adapter"
    assert values["general.architecture"] == "llama"
    assert values["adapter.type"] == "lora"
    assert values["adapter.lora.alpha"] == 16
    shapes = {tensor.name: list(map(int, tensor.shape)) for tensor in reader.tensors}
    assert shapes["blk.0.attn_q.weight.lora_a"] == [64, 4]  # GGUF names the inner size first
    assert shapes["blk.0.attn_q.weight.lora_b"] == [4, 64]
    assert len(shapes) == 2 * 4 * 2


def test_gguf_lora_takes_in_other_scalings(bases: Folder, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "up_proj"],
                        rank_pattern={"up_proj": 2}, alpha_pattern={"q_proj": 3})  # fmt: skip
    folder = adapter(ModelSpec(name=str(bases("llama")), dtype="float32"), config, tmp_path / "adapter")
    assert nt.export(folder, "gguf-lora", tmp_path / "lora.gguf", dtype="f32").proof.relative_difference < 1e-5


@pytest.mark.parametrize(
    ("config", "format", "message"),
    [
        (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "gguf-lora", "DoRA"),
        (LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), "gguf-lora", "a trained bias"),
        (nt.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "gguf-lora", "It is IA3"),
        (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), "gguf-lora", "lm_head"),
        (PromptTuningConfig(num_virtual_tokens=4), "merged", "A trained prompt is no change of a weight"),
    ],
)
def test_what_does_not_fit_the_format(config: Any, format: Any, message: str, bases: Folder, tmp_path: Path) -> None:
    folder = adapter(ModelSpec(name=str(bases("qwen3")), dtype="float32"), config, tmp_path / "adapter")
    out = tmp_path / "out.gguf"
    with pytest.raises(ExportError, match=message):
        nt.export(folder, format, out)
    assert not out.exists()


def test_refused_before_anything_is_written(bases: Folder, adapters: Folder, tmp_path: Path) -> None:
    def refused(error: type[NbtuneError], message: str, *arguments: Any, **settings: Any) -> None:
        with pytest.raises(error, match=message):
            nt.export(*arguments, **settings)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.gguf").exists()

    good, out = adapters("qwen2"), tmp_path / "out"
    refused(ExportError, "no export format 'onnx'.*\n.*adapter, merged, gguf, gguf-lora", good, "onnx", out)
    refused(ExportError, "merged cannot be written in q4_0", good, "merged", out, dtype="q4_0")
    refused(ExportError, "adapter has no dtype", good, "adapter", out, dtype="f16")
    refused(ExportError, "'4 apples' is no size of a file", good, "merged", out, max_shard_size="4 apples")
    refused(ExportError, r"must end in \.gguf", good, "gguf", out)
    refused(RunError, "no run and no adapter 'nobody'", "nobody", "merged", out)
    unfinished = run_folder(tmp_path / "unfinished", ModelSpec(name=str(bases("qwen2"))), None)
    refused(RunError, "unfinished has no weights yet", unfinished, "merged", out)
    foreign = run_folder(tmp_path / "foreign", ModelSpec(name=str(bases("qwen3"))), good)
    refused(AdapterError, "does not fit the model", foreign, "gguf", tmp_path / "out.gguf")

    cut = Path(shutil.copytree(good, tmp_path / "cut"))
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(AdapterError, "Unreadable weights", cut, "merged", out)
    diverged = Path(shutil.copytree(good, tmp_path / "diverged"))
    tensors = load_file(diverged / "adapter_model.safetensors")
    tensors = {name: tensor.fill_(float("nan")) if "layers.0" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, diverged / "adapter_model.safetensors")
    refused(AdapterError, "nan", diverged, "merged", out)
    refused(AdapterError, "nan", diverged, "gguf", tmp_path / "out.gguf")


def test_too_little_room_is_said_first(adapters: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "available_memory", lambda device: 1000)
    with pytest.raises(ExportError, match=r"Not enough memory to export qwen2\nIt takes 0\.0 GB"):
        nt.export(adapters("qwen2"), "merged", tmp_path / "out")
    monkeypatch.undo()
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(exporter.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ExportError, match="Not enough room on the disk"):
        nt.export(adapters("qwen2"), "merged", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(adapters: Folder, tmp_path: Path) -> None:
    arguments = ["export", str(adapters("qwen2")), "gguf", str(tmp_path / "model.gguf"), "--dtype", "f32"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "all 48 greedy tokens agree" in result.output
    assert (tmp_path / "model.gguf").exists()
