"""PEFT's default targets, by method and `model_type`, as facts: who gives no target_modules gets the modules of PEFT.

They are those of peft 0.21 (`peft.utils.constants`). Imports no torch. Where there is no entry, `structure.py` looks
at the model itself.
"""

from __future__ import annotations

import functools

_NORMS = "input_layernorm post_attention_layernorm"
_FEEDFORWARD_NORMS = "pre_feedforward_layernorm post_feedforward_layernorm"

# Names of modules, and the model types in which they are adapted. What begins with ".*" is a regular expression.
_LORA = {
    "q v": "t5 mt5",
    "q_proj v_proj": "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt qwen2 qwen3 stablelm",
    "query_key_value": "RefinedWeb RefinedWebModel bloom chatglm falcon gpt_neox",
    "query value": "bert electra layoutlm roberta xlm-roberta",
    "c_attn": "gpt2 gpt_bigcode",
    "c_proj c_attn": "btlm",
    "q v q_proj v_proj": "blip-2",
    "query_proj value_proj": "deberta-v2",
    "in_proj": "deberta",
    "Wqkv": "mpt",
    "qkv_proj": "codegen",
    "q_proj v_proj fc1 fc2": "phi",
    r".*language_model\..*\.(q_proj|v_proj)": "gemma4",
    "q_proj k_proj v_proj o_proj": "nemotron_h",
    "key value receptance output": "rwkv",
    "r_proj k_proj v_proj o_proj key value": "rwkv7",
}
_IA3 = {  # the last one is the feedforward module, but in mt5
    "k v wo": "t5",
    "k v wi_1": "mt5",
    "key value output.dense": "bert roberta",
    "key_proj value_proj output.dense": "deberta-v2",
    "in_proj output.dense": "deberta",
    "query_key_value dense_4h_to_h": "RefinedWeb RefinedWebModel falcon gpt_neox",
    "query_key_value mlp.dense_4h_to_h": "bloom",
    "c_attn mlp.c_proj": "gpt2 gpt_bigcode",
    "q_proj v_proj c_proj": "gpt_neo",
    "q_proj v_proj fc_out": "gptj",
    "q_proj v_proj fc2": "bart phi",
    "q_proj k_proj fc2": "opt",
    "k_proj v_proj w2": "mixtral",
    "k_proj v_proj down_proj": "llama mistral",
    "q_proj v_proj down_proj": "gemma gemma2 gemma3_text llama4 qwen2 qwen3",
}
_LN_TUNING = {
    f"{_NORMS} norm": "gemma llama mistral",
    f"{_NORMS} ln_f": "bloom falcon",
    f"{_NORMS} {_FEEDFORWARD_NORMS} norm": "gemma2 gemma3_text",
    f"multi_modal_projector {_NORMS} norm embed_tokens lm_head": "llava",
    "post_attention_layernorm": "qwen2 qwen3",
    "input_layernorm final_layernorm": "phi",
    "layer_norm final_layer_norm": "t5 mt5",
    "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm": "bart",
    "layernorm LayerNorm final_layer_norm self_attn_layer_norm": "blip-2",
    "ln_1 ln_2 ln_f": "gpt2",
    "ln_1 ln_f": "gptj",
}
_BEFT = {
    "v": "t5 mt5",
    "value": "bert roberta",
    "v_proj": "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt phi qwen2 qwen3",
    "value_proj": "deberta-v2",
}

# The other methods have LoRA's table with some model types changed, or left out ("").
_MLP_OF_GPT2 = {"mlp.c_proj": "gpt2 gpt_bigcode"}
_ADAPTIVE = {
    "": "blip-2 xlm-roberta electra layoutlm chatglm mpt RefinedWebModel RefinedWeb falcon btlm codegen mistral "
    "mixtral stablelm phi rwkv rwkv7",
    "q k v o wi wo": "t5",
    "q k v o wi_0 wi_1 wo": "mt5",
    "q_proj k_proj v_proj out_proj fc1 fc2": "bart opt",
    "query_proj key_proj value_proj dense": "deberta-v2",
}
_TABLES = {
    "IA3": (_IA3,),
    "LN_TUNING": (_LN_TUNING,),
    "BEFT": (_BEFT,),
    "ADALORA": (_LORA, _ADAPTIVE, {"query key value dense": "roberta"}),
    "VBLORA": (_LORA, _ADAPTIVE),
    "FOURIERFT": (_LORA, _MLP_OF_GPT2),
    "C3A": (_LORA, _MLP_OF_GPT2),
    "WAVEFT": (_LORA, _MLP_OF_GPT2, {"": "btlm rwkv rwkv7"}),
    "SHIRA": (_LORA, {"q_proj v_proj": "phi"}),
    "VERA": (_LORA, {"q_proj v_proj": "phi"}),
    **dict.fromkeys("LORA OFT BOFT HRA LOHA LOKR RANDLORA HIRA MISS GRALORA ROAD DELORA".split(), (_LORA,)),
}


def default_targets(peft_type: str, model_type: str) -> list[str] | str | None:
    """The names of the modules (or the regular expression) that PEFT adapts by default; None where it has no entry."""
    names = _by_model(peft_type).get(model_type, "")
    return names if names.startswith(".*") else names.split() or None


def default_feedforward(model_type: str) -> list[str] | None:
    """Those of IA3's default targets whose input is scaled, not their output; None where there is no entry."""
    targets = default_targets("IA3", model_type)
    if targets is None:
        return None
    return [] if model_type == "mt5" else list(targets[-1:])


@functools.cache
def _by_model(peft_type: str) -> dict[str, str]:
    tables = _TABLES.get(peft_type, ())
    return {model: names for table in tables for names, models in table.items() for model in models.split()}
