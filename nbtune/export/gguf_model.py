"""A whole model as one GGUF file, and reading it back by transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.integrations.gguf import read_gguf_metadata

from nbtune import _files
from nbtune._transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from nbtune.errors import ExportError
from nbtune.export import gguf_vocabulary
from nbtune.export.card import public_name
from nbtune.export.folders import check_range
from nbtune.export.gguf_families import Family
from nbtune.export.precision import Precision
from nbtune.export.proof import QUESTIONS, tokens
from nbtune.export.subject import Subject
from nbtune.models.loader import no_progress_bars

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Type = gguf.GGMLQuantizationType

_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
_EMBEDDINGS = ("token_embd.weight", "output.weight")
# What the file says of the model -> the same in transformers' config.
_SAME = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
}


def write_gguf(subject: Subject, out: Path, precision: Precision) -> None:
    """Write the merged model with its tokenizer and chat template.

    Vectors (norms, biases) are fp32; in the 4-bit types the embedding and the head are q8_0; rows that are no whole
    number of blocks are f16. The model in memory takes on the values of block types as they are written. Raises
    ExportError, and leaves nothing behind, for what GGUF cannot hold.
    """
    model = subject.merge()
    family = Family(model.config)
    weights = {family.name(name): (name, weight.detach()) for name, weight in model.named_parameters()}
    rope = family.rope_tensors()
    types = {name: _type(name, weight, precision) for name, (_, weight) in weights.items()}
    writer = gguf.GGUFWriter(None, family.architecture)
    add_description(writer, subject, gguf.GGUFType.MODEL)
    writer.add_file_type(_FILE_TYPES[precision.name])
    if precision.in_blocks:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    family.add_hyperparameters(writer)
    _add_tokenizer(writer, subject, model.config.vocab_size)

    def stored(name: str) -> np.ndarray[Any, Any]:
        if name in rope:
            return rope[name].numpy()
        parameter, weight = weights[name]
        if weight.dim() == 1:
            return encoded(parameter, family.stored(parameter, weight), types[name])
        data = encoded(parameter, weight, types[name])
        if precision.in_blocks:  # before its rows are moved, so that a wrong move shows in the proof
            weight.copy_(torch.from_numpy(gguf.dequantize(data, types[name])))
        return family.stored(parameter, torch.from_numpy(data)).numpy()

    shapes = {name: (rope[name].shape, Type.F32) for name in rope}
    shapes |= {name: (weight.shape, types[name]) for name, (_, weight) in weights.items()}
    write_tensors(writer, out, shapes, stored)


def add_description(writer: gguf.GGUFWriter, subject: Subject, kind: str) -> None:
    """What people read of a file."""
    trained, base = subject.trained, public_name(subject.trained.model.name)
    writer.add_type(kind)
    writer.add_name(f"{base} {trained.name}")  # two words: transformers cannot read a file whose name is "mistral"
    writer.add_description(f"{trained.label} of {base}")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base)
    writer.add_quantized_by(f"nbtune {version('nbtune')}")


def write_tensors(
    writer: gguf.GGUFWriter, out: Path, shapes: dict[str, tuple[torch.Size, gguf.GGMLQuantizationType]], stored: Any
) -> None:
    """Write the file, one tensor in memory at a time: `stored(name)` is its bytes as an array.

    Raises OSError where the disk takes only a part of it.
    """
    for name, (shape, kind) in shapes.items():
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * size, raw_dtype=kind)
    with _files.atomic_file(out) as temporary:
        try:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name in shapes:
                writer.write_tensor_data(stored(name))
            assert writer.fout is not None
            size = writer.fout[0].tell()
        finally:
            writer.close()
        written = temporary.stat().st_size
        if written < size:  # numpy says nothing of the last kilobytes of an array that find no room
            raise OSError(f"Of {size:,} bytes the disk took {written:,}.")


def encoded(name: str, weight: Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """A weight in one of GGUF's types. Raises ExportError where it holds what f16 cannot."""
    weight = weight.float().contiguous().cpu()
    check_range(name, weight, torch.float16 if kind == Type.F16 else torch.float32)
    return gguf.quantize(weight.numpy(), kind)


def read_gguf(path: Path, config: Any, dtype: torch.dtype) -> Any:
    """The written model, its weights read by transformers.

    `config` is the model's own: transformers reads no rotation scaling and not every head size from a GGUF. What the
    file says must be the same. Raises ExportError where it is not.
    """
    values, names = read_gguf_metadata(str(path))
    prefix = values["general.architecture"]
    found = {key: values[f"{prefix}.{name}"] for name, key in _SAME.items()}
    found["tie_word_embeddings"] = "output.weight" not in names
    wrong = [
        f"{key} is {value}, not {vars(config)[key]}"
        for key, value in found.items()
        if not math.isclose(value, vars(config)[key], rel_tol=1e-6)
    ]
    if wrong:
        raise ExportError("The written file says something else of the model", "; ".join(wrong), "Please report this.")
    if config.model_type == "mistral":  # which is Llama there
        config = LlamaConfig.from_dict({**config.to_dict(), "model_type": "llama"})
    with no_progress_bars():
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=config, dtype=dtype)


def same_tokens(path: Path, tokenizer: PreTrainedTokenizerBase, chats: Sequence[str]) -> bool:
    """Whether the written tokenizer, as transformers reads it, gives the ids of `tokenizer` for questions and chats.

    Not for chats with a SentencePiece vocabulary: a GGUF does not say whether a space is put after special tokens, and
    llama.cpp and transformers do not agree on it.
    """
    found = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    texts = [*QUESTIONS, *(chats if gguf_vocabulary.is_byte_level(tokenizer) else [])]
    return tokens(texts, found) == tokens(texts, tokenizer)


def _type(name: str, weight: Tensor, precision: Precision) -> gguf.GGMLQuantizationType:
    if weight.dim() == 1:
        return Type.F32
    kind = Type[precision.name.upper()]
    if precision.bits < 8 and name in _EMBEDDINGS:
        kind = Type.Q8_0
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if weight.shape[-1] % block == 0 else Type.F16


def _add_tokenizer(writer: gguf.GGUFWriter, subject: Subject, size: int) -> None:
    source = subject.source
    if source.gguf_file is not None and source.path is not None:
        # transformers reads no more than a part of a GGUF's tokenizer, so what it made of it says less than the file.
        gguf_vocabulary.copy(source.path / source.gguf_file, writer)
    else:
        gguf_vocabulary.vocabulary(subject.tokenizer, size).add_to(writer)
    template = subject.tokenizer.chat_template
    if isinstance(template, str):
        writer.add_chat_template(template)
