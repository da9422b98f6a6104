"""GGUF files: read by plain transformers, they say what the adapter in memory says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import tiny_families
import torch
from tiny_families import adapter
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import nbtune as nt
from nbtune.errors import ExportError
from nbtune.export import gguf_families
from nbtune.export.gguf_vocabulary import vocabulary
from nbtune.models import load
from nbtune.peft import LoraConfig, PeftModel
from nbtune.spec import ModelSpec

Folder = Callable[[str], Path]
ARCHITECTURES = {"mistral": "llama"}
PROMPT = "Write one sentence about the sea, then count from 1 to 12."


def metadata(path: Path) -> dict[str, object]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


@torch.no_grad()
def logits(model: object, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0].float()  # type: ignore[operator]


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_a_family(family: str, bases: Folder, adapters: Folder, tmp_path: Path) -> None:
    out = tmp_path / f"{family}.gguf"
    done = nt.export(adapters(family), "gguf", out)
    assert done.proof.relative_difference < 0.005
    assert done.same_tokens is True

    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=out.name)  # with the file's own hyperparameters
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path, gguf_file=out.name)
    base = load(ModelSpec(name=str(bases(family)), dtype="float32"), device="cpu")
    adapted = PeftModel.from_pretrained(base.model, adapters(family))
    ids = base.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    assert tokenizer(PROMPT, add_special_tokens=False)["input_ids"] == ids
    expected, found = logits(adapted, ids), logits(read, ids)
    assert (found - expected).abs().max() < 0.01 * expected.std()
    with adapted.disable_adapter():
        assert (expected - logits(adapted, ids)).abs().max() > 0.1

    values = metadata(out)
    assert values["general.architecture"] == ARCHITECTURES.get(family, family)
    assert values["tokenizer.chat_template"] == tiny_families.TEMPLATE
    rows = base.model.config.vocab_size
    assert len(values["tokenizer.ggml.tokens"]) == rows  # type: ignore[arg-type]
    assert values["tokenizer.ggml.tokens"][-1] == f"[PAD{rows - 1}]"  # type: ignore[index]
    names = {tensor.name for tensor in gguf.GGUFReader(out).tensors}
    assert ("output.weight" in names) is not base.model.config.tie_word_embeddings


@pytest.mark.parametrize(("dtype", "embedding", "most"), [("q8_0", "Q8_0", 0.05), ("q4_1", "Q8_0", 0.4)])
def test_blocks(dtype: str, embedding: str, most: float, adapters: Folder, tmp_path: Path) -> None:
    done = nt.export(adapters("llama"), "gguf", tmp_path / "model.gguf", dtype=dtype)
    assert 0.001 < done.proof.relative_difference < most
    assert done.rounded is not None
    assert done.rounded.largest_difference < 1e-4
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(done.path).tensors}
    assert types["token_embd.weight"] == embedding
    assert types["blk.0.attn_q.weight"] == dtype.upper()
    assert types["blk.0.attn_norm.weight"] == "F32"


def test_bf16(adapters: Folder, tmp_path: Path) -> None:
    done = nt.export(adapters("llama"), "gguf", tmp_path / "model.gguf", dtype="bf16")
    assert done.proof.relative_difference < 0.01
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(done.path).tensors}
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == "BF16"
    assert types["blk.0.attn_norm.weight"] == "F32"
    values = metadata(done.path)
    assert values["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16


@pytest.mark.parametrize("dtype", ["f32", "q4_0"])
def test_a_wrong_layout_fails_the_proof(
    dtype: str, adapters: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_families, "paired", lambda weight, heads: weight)
    out = tmp_path / "model.gguf"
    with pytest.raises(ExportError, match="does not answer as the adapter does"):
        nt.export(adapters("llama"), "gguf", out, dtype=dtype)
    assert out.exists()
    report = json.loads((tmp_path / "model.export.json").read_text())
    assert report["proved"] is False
    assert report["proof"]["relative_difference"] > 0.1


def test_another_architecture_is_refused(adapters: Folder, tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}))
    folder.mkdir()
    config = json.loads((adapters("llama") / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    with pytest.raises(ExportError, match=r"gpt_neox cannot be written as GGUF\nThese can: Llama, Mistral, Qwen2"):
        nt.export(folder, "gguf", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe", "dbrx"])
def test_the_rules_for_splitting_are_told(pre: str) -> None:
    made = tiny_families.tokenizer(pre)
    found = vocabulary(made, len(made) + 2)
    assert (found.model, found.pre) == ("gpt2", pre)
    assert found.special == {"bos": 1, "eos": 2, "unk": 0, "pad": 2}
    assert [kind.name for kind in found.types[-2:]] == ["UNUSED", "UNUSED"]
    assert found.types[3].name == "CONTROL"


def test_unknown_rules_are_refused() -> None:
    from tokenizers import pre_tokenizers

    made = tiny_families.tokenizer("gpt-2")
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(ExportError, match="rules for splitting text are none of gpt-2, smollm"):
        vocabulary(made, 400)
    with pytest.raises(ExportError, match="tokens, the embedding 10 rows"):
        vocabulary(tiny_families.tokenizer("gpt-2"), 10)


def test_biases_and_scaled_rotations(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    base = tiny_families.write("llama", tmp_path / "base", attention_bias=True, rope_parameters=rope)
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj"])
    folder = adapter(ModelSpec(name=str(base), dtype="float32"), config, tmp_path / "adapter")
    done = nt.export(folder, "gguf", tmp_path / "model.gguf", dtype="f32")
    assert done.proof.relative_difference < 1e-5
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(done.path).tensors}
    assert "blk.0.attn_q.bias" in tensors
    assert tensors["rope_freqs.weight"].data.max() == 8


def test_long_rotations(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + i / 10 for i in range(8)],
            "long_factor": [2.0 + i for i in range(8)]}  # fmt: skip
    base = tiny_families.write(
        "phi3", tmp_path / "base", rope_parameters=rope, original_max_position_embeddings=256, sliding_window=128
    )
    config = LoraConfig(r=4, target_modules=["qkv_proj"])
    folder = adapter(ModelSpec(name=str(base), dtype="float32"), config, tmp_path / "adapter")
    done = nt.export(folder, "gguf", tmp_path / "model.gguf", dtype="f32")
    assert done.proof.relative_difference < 1e-5
    tensors = {tensor.name: tensor.data.tolist() for tensor in gguf.GGUFReader(done.path).tensors}
    assert tensors["rope_factors_long.weight"] == rope["long_factor"]
    values = metadata(done.path)
    assert values["phi3.rope.scaling.original_context_length"] == 256
    assert values["phi3.attention.sliding_window"] == 128
    assert values["phi3.rope.scaling.attn_factor"] == pytest.approx((1 + 1 / 8) ** 0.5)  # 512 is twice 256 = 2 ** 8


def test_llama3_factors_are_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=rope)
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    found = gguf_families.Family(config).rope_tensors()["rope_freqs.weight"]
    torch.testing.assert_close(plain / found, scaled)
    assert found.min() == 1
    assert found.max() == 8
