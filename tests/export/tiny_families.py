"""Models of each family that can be written as GGUF: a few kilobytes of random weights, and a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nbtune.models import load
from nbtune.peft import PeftConfig, get_peft_model
from nbtune.spec import ModelSpec

TEXT = [
    "What does os.path.join do? It joins one or more path segments.",
    "Write one sentence about the sea, then count from 1 to 12.",
    "I'd like 250 g of bread and café, please! Explain this code.",
    "def add(a, b):\n    return a + b\n",
] * 4
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
# family -> (model_type, what differs from SIZES, tokenizer)
FAMILIES = {
    "llama": ("llama", {"tie_word_embeddings": True}, "smollm"),
    "mistral": ("mistral", {"head_dim": 32}, "sentencepiece"),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, "qwen2"),
    "qwen3": ("qwen3", {"head_dim": 128}, "qwen2"),
    "gemma2": ("gemma2", {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 8}, "gemma"),
    "gemma3": ("gemma3_text", {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 8,
                               "num_hidden_layers": 7}, "gemma"),
    "phi3": ("phi3", {}, "sentencepiece"),
}  # fmt: skip
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level(pre: str) -> Tokenizer:
    """Byte-level BPE that splits text as `pre` does."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    split = {"qwen2": QWEN, "llama-bpe": LLAMA3, "dbrx": LLAMA3}.get(pre)
    if split:
        first = [pre_tokenizers.Split(Regex(split), behavior="isolated")]
    else:
        first = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, last]) if first else last
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def sentencepiece(*, space_first: bool) -> Tokenizer:
    """BPE over characters with bytes for the rest, as a SentencePiece model becomes in transformers."""
    learnt = Tokenizer(models.BPE(unk_token="<unk>"))
    learnt.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    learnt.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    merges = [tuple(pair) for pair in json.loads(learnt.to_str())["model"]["merges"]]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["".join(pair) for pair in merges]
    tokens += sorted({letter for pair in merges for part in pair for letter in part} | {"▁"})
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if space_first else replace
    strip = [decoders.Strip(" ", 1, 0)] if space_first else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return tokenizer


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    characters = kind in ("sentencepiece", "gemma")
    inner = sentencepiece(space_first=kind == "sentencepiece") if characters else byte_level(kind)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    made.chat_template = TEMPLATE
    return made


def write(family: str, folder: Path, **changes: object) -> Path:
    """A model's folder for transformers."""
    model_type, settings, kind = FAMILIES[family]
    made = tokenizer(kind)
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = CONFIG_MAPPING[model_type](**{**SIZES, **ids, "vocab_size": len(made) + 3, **settings, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases that are all alike would hide mistakes
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def adapter(model: ModelSpec, config: PeftConfig, folder: Path, size: float = 0.1) -> Path:
    """An adapter of `model` that changes what it says, by random numbers of this `size`."""
    torch.manual_seed(1)
    adapted = get_peft_model(load(model, device="cpu").model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return folder
