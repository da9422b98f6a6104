"""The architectures that can be written as GGUF: their hyperparameters, and what llama.cpp keeps differently.

Llama and Mistral are one architecture there, with the rows of each query and key head in pairs (i, i + d/2); Gemma's
norms are stored with the 1 that the model adds; everything else is a question of names, which the gguf package knows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gguf
import torch
from torch import Tensor

from nbtune.errors import ExportError

# model_type of a transformers config -> llama.cpp's architecture
FAMILIES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
}
NAMES = "Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3 (text) and Phi-3"
_GEMMAS = ("gemma2", "gemma3_text")


class Family:
    """How one model's config and weights are written. Raises ExportError for what llama.cpp would compute otherwise."""

    def __init__(self, config: Any) -> None:
        check(config)
        self.config = config
        self.kind: str = config.model_type
        self.arch = FAMILIES[self.kind]
        self.heads: int = config.num_attention_heads
        self.key_heads: int = config.num_key_value_heads
        self.head_size: int = vars(config).get("head_dim") or config.hidden_size // self.heads
        rope = config.rope_parameters
        self.rope: Mapping[str, Any] = rope.get("full_attention", rope)
        self._names = gguf.get_tensor_name_map(self.arch, config.num_hidden_layers)
        _check_attention(config, self.head_size)

    @property
    def architecture(self) -> str:
        return gguf.MODEL_ARCH_NAMES[self.arch]

    def name(self, parameter: str) -> str:
        """llama.cpp's name of a parameter such as `model.layers.0.mlp.up_proj.weight`. Raises ExportError for none."""
        found = self._names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ExportError(
                f"GGUF has no place for {parameter}",
                f"llama.cpp's {self.architecture} has no such weight.",
                "Export the merged model.",
            )
        return found

    def stored(self, parameter: str, weight: Tensor) -> Tensor:
        """A weight as llama.cpp keeps it."""
        if self.arch == gguf.MODEL_ARCH.LLAMA and (heads := self._rotated_heads(parameter)):
            return paired(weight, heads)
        if self.kind in _GEMMAS and parameter.endswith("norm.weight"):
            return weight.float() + 1
        return weight

    def own(self, parameter: str, weight: Tensor) -> Tensor:
        """The inverse of `stored` for the rows of a projection."""
        heads = self._rotated_heads(parameter)
        return unpaired(weight, heads) if self.arch == gguf.MODEL_ARCH.LLAMA and heads else weight

    def _rotated_heads(self, parameter: str) -> int | None:
        """The number of heads of a query or key projection; None for other parameters."""
        return {"q_proj": self.heads, "k_proj": self.key_heads}.get(parameter.split(".")[-2])

    def add_hyperparameters(self, writer: gguf.GGUFWriter) -> None:
        """Write what llama.cpp builds the model from."""
        config = self.config
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.key_heads)
        writer.add_key_length(self.head_size)
        writer.add_value_length(self.head_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(int(self.head_size * self.rope.get("partial_rotary_factor", 1.0)))
        writer.add_rope_freq_base(self.rope["rope_theta"])
        if self.kind in (*_GEMMAS, "phi3"):
            writer.add_sliding_window(config.sliding_window or 0)
        if self.kind == "gemma3_text":
            writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
        if self.kind in _GEMMAS:
            if config.attn_logit_softcapping:
                writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            if config.final_logit_softcapping:
                writer.add_final_logit_softcapping(config.final_logit_softcapping)
        if self.kind == "phi3":
            writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        self._add_rope_scaling(writer)

    def _add_rope_scaling(self, writer: gguf.GGUFWriter) -> None:
        kind = self.rope["rope_type"]
        if kind == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(self.rope["factor"])
        elif kind == "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(self.rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(self.rope["original_max_position_embeddings"])
        elif kind == "longrope":
            writer.add_rope_scaling_attn_factors(self._longrope_attention())

    def rope_tensors(self) -> dict[str, Tensor]:
        """Factors of the rotations' frequencies that a file carries as tensors, fp32, by their names."""
        kind = self.rope["rope_type"]
        if kind == "llama3":
            return {"rope_freqs.weight": self._llama3_factors()}
        if kind == "longrope":
            return {
                f"rope_factors_{length}.weight": torch.tensor(self.rope[f"{length}_factor"], dtype=torch.float32)
                for length in ("long", "short")
            }
        return {}

    def _llama3_factors(self) -> Tensor:
        """What each frequency [d/2] is divided by: 1 for the fast ones, `factor` for the slow, in between a blend."""
        rope, size = self.rope, self.head_size
        original = rope["original_max_position_embeddings"]
        exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
        turns = original / (2 * math.pi * rope["rope_theta"] ** exponents)  # of each frequency in the first context
        low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        return 1 / ((1 - blend) / factor + blend)

    def _longrope_attention(self) -> float:
        original = self.config.original_max_position_embeddings
        scale = self.config.max_position_embeddings / original
        return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def check(config: Any) -> None:
    """Raise ExportError for an architecture that is not written as GGUF."""
    if config.model_type not in FAMILIES:
        raise ExportError(
            f"{config.model_type} cannot be written as GGUF",
            f"These can: {NAMES}.",
            "Export the merged model, and convert it with llama.cpp's own script.",
        )
    rope = config.rope_parameters
    kinds = {part["rope_type"] for part in (rope.values() if "full_attention" in rope else [rope])}
    if unknown := kinds - {"default", "linear", "llama3", "yarn", "longrope"}:
        raise ExportError(f"Rotations of type {', '.join(unknown)} cannot be written as GGUF", "", "")


def _check_attention(config: Any, head_size: int) -> None:
    """llama.cpp knows Gemma's layers and scales by heart; refuse a model that has others."""
    kind, layers = config.model_type, config.num_hidden_layers
    problem = ""
    if kind in ("qwen2", "qwen3") and config.use_sliding_window:
        problem = "It attends within a sliding window in some layers."
    if kind in _GEMMAS:
        period = 2 if kind == "gemma2" else 6
        expected = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]
        scalars = {head_size}
        if layers == (46 if kind == "gemma2" else 62):  # the 27B models
            scalars = {config.hidden_size // config.num_attention_heads}
        if list(config.layer_types) != expected:
            problem = f"Its layers do not have full attention every {period}th layer."
        elif config.query_pre_attn_scalar not in scalars:
            problem = f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, not {scalars.pop()}."
    if problem:
        raise ExportError(f"This {kind} model cannot be written as GGUF", f"{problem} llama.cpp computes otherwise.")


def paired(weight: Tensor, heads: int) -> Tensor:
    """Rows [heads * d, ...] in the order that llama.cpp rotates: i and i + d/2 of each head side by side."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def unpaired(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `paired`."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
