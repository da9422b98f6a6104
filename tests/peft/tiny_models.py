"""Tiny random models in fp32. Nothing is downloaded."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from nbtune.modules.quantised import dequantised


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=96, max_position_embeddings=64, pad_token_id=0, **{**sizes, **heads, **changes})
    return LlamaForCausalLM(config).eval()


def neox() -> GPTNeoXForCausalLM:
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=96, max_position_embeddings=64, **sizes)).eval()


def bert() -> BertForSequenceClassification:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=96, max_position_embeddings=64, **sizes, **dropouts)
    return BertForSequenceClassification(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(4)
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, bos_token_id=1, eos_token_id=2, **sizes, **dropouts)).eval()


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(5)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=96, pad_token_id=0, decoder_start_token_id=0, dropout_rate=0.0, **sizes)
    return T5ForConditionalGeneration(config).eval()


MODELS = {"llama": llama, "neox": neox, "bert": bert, "gpt2": gpt2, "t5": t5}


def logits(model: nn.Module, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def quantised_and_plain(bits: int) -> tuple[nn.Module, nn.Module]:
    """A tiny Llama whose adapted layers are quantised, and the same with what these layers hold as floats."""
    model = llama(hidden_size=64, intermediate_size=64, num_attention_heads=2)
    for block in model.model.layers:
        for parent, name in ((block.self_attn, "q_proj"), (block.mlp, "down_proj")):
            old = getattr(parent, name)
            kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
            options = (
                {"compute_dtype": torch.float32, "quant_type": "nf4"} if bits == 4 else {"has_fp16_weights": False}
            )
            new = kind(old.in_features, old.out_features, bias=False, **options)
            new.load_state_dict({"weight": old.weight.data})
            setattr(parent, name, new.to("cpu"))
    plain = copy.deepcopy(model)
    for block in plain.model.layers:
        for parent, name in ((block.self_attn, "q_proj"), (block.mlp, "down_proj")):
            layer = nn.Linear(64, 64, bias=False)
            layer.weight.data = dequantised(getattr(parent, name), torch.float32)
            setattr(parent, name, layer)
    return model.eval(), plain.eval()
