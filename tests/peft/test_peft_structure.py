"""Targets where none are named: PEFT's own where it has an entry, and by structure everywhere else.

The models are on the meta device: two blocks, and otherwise the sizes of their default config.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from nbtune.errors import AdapterError
from nbtune.peft import LoraConfig, find_targets, get_peft_model
from nbtune.peft.config import LayerConfig, PeftConfig
from nbtune.peft.targets import matching, resolve, walk

LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers"}
LAYERS |= {"decoder_layers", "depth"}
CAUSAL = transformers.AutoModelForCausalLM
SEQ2SEQ = transformers.AutoModelForSeq2SeqLM
ENCODER = transformers.AutoModel
VISION = transformers.AutoModelForImageTextToText


def empty(model_type: str, auto: Any = CAUSAL, **changes: Any) -> nn.Module:
    """A model of that type with two layers everywhere."""
    config = transformers.AutoConfig.for_model(model_type)
    shorten(config)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        return auto.from_config(config)


def shorten(config: transformers.PreTrainedConfig) -> None:
    for value in list(vars(config).values()):
        if isinstance(value, transformers.PreTrainedConfig):
            shorten(value)
    for name in LAYERS & {*vars(config), *config.attribute_map}:
        if name != "num_hidden_layers" or "layers_block_type" not in vars(config):  # derived from the list of types
            setattr(config, name, 2)


def of_peft(model: nn.Module, config: peft.PeftConfig) -> dict[str, BaseTunerLayer]:
    with warnings.catch_warnings(action="ignore"):
        peft.get_peft_model(model, config)
    return {name: part for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)}


def endings(paths: list[str]) -> set[str]:
    """The paths without numbers and without what leads to the blocks: {"self_attn.q_proj", ...}."""
    return {re.sub(r"^.*?\.\d+\.", "", re.sub(r"\.\d+$", ".N", path)) for path in paths}


IN_PEFT = {
    **dict.fromkeys("t5 mt5 bart".split(), SEQ2SEQ),
    **dict.fromkeys("deberta deberta-v2 layoutlm electra".split(), ENCODER),
    **dict.fromkeys("blip-2 llama4 gemma4".split(), VISION),
    **dict.fromkeys(
        "gpt2 bloom opt gptj gpt_neox gpt_neo bert roberta xlm-roberta llama gpt_bigcode mpt falcon codegen mistral "
        "stablelm phi gemma gemma2 gemma3_text qwen2 qwen3 nemotron_h rwkv".split(),
        CAUSAL,
    ),
}


@pytest.mark.parametrize("model_type", IN_PEFT)
def test_where_peft_has_an_entry_ours_is_the_same(model_type):
    model = empty(model_type, IN_PEFT[model_type])
    assert isinstance(model, transformers.PreTrainedModel)
    assert model.config.model_type == model_type
    ours = find_targets(model, LoraConfig())
    assert set(ours) == set(of_peft(model, peft.LoraConfig()))
    assert len(ours) == len(set(ours)) > 0


def test_where_peft_loses_its_entry_to_new_names_it_still_counts():
    """PEFT rewrites the targets of MoE models for transformers 5, and then finds none for Mixtral."""
    assert endings(find_targets(empty("mixtral"), LoraConfig())) == {"self_attn.q_proj", "self_attn.v_proj"}


@pytest.mark.parametrize("model_type", "llama mistral gemma2 qwen2 opt gptj bloom gpt2 t5 mt5 bert".split())
def test_targets_and_feedforward_modules_of_ia3_are_those_of_peft(model_type):
    config = PeftConfig.from_dict({"peft_type": "IA3"})
    model = empty(model_type, IN_PEFT[model_type])
    assert isinstance(config, LayerConfig)
    resolved = resolve(model, config).to_dict()
    found = find_targets(model, config)
    theirs = of_peft(model, peft.IA3Config())
    assert set(found) == set(theirs)
    feedforward = {path for path in found if path.endswith(tuple(resolved["feedforward_modules"]))}
    assert feedforward == {
        path for path, layer in theirs.items() if isinstance(layer, IA3Layer) and layer.is_feedforward
    }


ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
MLP = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
SHARED = {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
OUT = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
CROSS = {f"encoder_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
MLA = {f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
BERT = {f"attention.self.{name}" for name in ("query", "key", "value")}
BERT |= {"attention.output.dense", "intermediate.dense", "output.dense"}
DELTA = {"linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba", "linear_attn.out_proj"}
T5 = {f"layer.0.SelfAttention.{name}" for name in "qkvo"} | {f"layer.1.EncDecAttention.{name}" for name in "qkvo"}
T5 |= {f"layer.{number}.DenseReluDense.{name}" for number in (1, 2) for name in ("wi_0", "wi_1", "wo")}
EXPERTS = {"first_k_dense_replace": 1, "num_hidden_layers": 2}
DEEPSEEK = MLA | MLP | {f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}

NOT_IN_PEFT = {
    "smollm3": (CAUSAL, ATTENTION | MLP),
    "granite": (CAUSAL, ATTENTION | MLP),
    "cohere": (CAUSAL, ATTENTION | MLP),
    "olmo2": (CAUSAL, ATTENTION | MLP),
    "glm4": (CAUSAL, ATTENTION | {"mlp.gate_up_proj", "mlp.down_proj"}),
    "phi3": (CAUSAL, {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}),
    "modernbert": (transformers.AutoModelForMaskedLM, {"attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"}),
    "camembert": (transformers.AutoModelForSequenceClassification, BERT),
    "umt5": (SEQ2SEQ, T5),
    "whisper": (transformers.AutoModelForSpeechSeq2Seq, OUT | CROSS | {"fc1", "fc2"}),
    # Experts in one tensor, beside a router and perhaps a shared expert with its gate.
    "gpt_oss": (CAUSAL, ATTENTION),
    "olmoe": (CAUSAL, ATTENTION),
    "qwen3_moe": (CAUSAL, ATTENTION),
    "qwen2_moe": (CAUSAL, ATTENTION | SHARED),
    "qwen3_next": (CAUSAL, DELTA | SHARED),
    "deepseek_v3": (CAUSAL, DEEPSEEK),
    "llama4_text": (CAUSAL, ATTENTION | {name.replace("mlp.", "feed_forward.") for name in SHARED}),
    "longcat_flash": (
        CAUSAL,
        {f"mlps.{number}.{name.removeprefix('mlp.')}" for number in (0, 1) for name in MLP}
        | {name.replace("self_attn.", f"self_attn.{number}.") for number in (0, 1) for name in MLA},
    ),
    "jetmoe": (CAUSAL, {"self_attention.kv_proj"}),
    # Fused kernels read the weights of Mamba's other projections without calling them.
    "mamba": (CAUSAL, {"mixer.in_proj"}),
    "falcon_h1": (CAUSAL, ATTENTION | {name.replace("mlp.", "feed_forward.") for name in MLP} | {"mamba.in_proj"}),
    # Towers and projectors are told from the text model.
    "qwen2_5_vl": (VISION, ATTENTION | MLP),
    "qwen3_vl": (VISION, ATTENTION | MLP),
    "llava": (VISION, ATTENTION | MLP),
    "gemma3": (VISION, ATTENTION | MLP),
    "git": (CAUSAL, BERT),
    "qwen2_audio": (transformers.AutoModelForMultimodalLM, ATTENTION | MLP),
}


@pytest.mark.parametrize("model_type", NOT_IN_PEFT)
def test_by_structure_every_projection_of_attention_and_mlp(model_type):
    auto, expected = NOT_IN_PEFT[model_type]
    model = empty(model_type, auto, **(EXPERTS if model_type == "deepseek_v3" else {}))
    with pytest.raises(ValueError, match=r"specify `target_modules`|No `target_modules` passed"):
        peft.get_peft_model(model, peft.LoraConfig())
    config = resolve(model, LoraConfig())
    found = matching(config, walk(model))
    assert endings(found) == expected
    assert not any(
        re.search(r"vis(ion|ual)|audio_tower|projector|merger|lm_head|classifier|router", path) for path in found
    )
    blocks = {match[0] for path in found if (match := re.match(r".*?\.\d+\.", path))}
    assert len(blocks) == (4 if model_type in ("umt5", "whisper") else 2)
    # `peft` understands what was written down. (Its LoRA alone takes a shared expert's layers for experts in a tensor.)
    assert set(of_peft(model, peft.LoHaConfig(target_modules=config.target_modules))) == set(found)


def test_towers_can_be_named():
    found = find_targets(empty("llava", VISION), LoraConfig(target_modules=r".*vision_tower.*(fc1|fc2)"))
    assert endings(found) == {"mlp.fc1", "mlp.fc2"}
    assert all("vision_tower" in path for path in found)


@pytest.mark.parametrize(
    ("peft_type", "model_type", "auto", "expected"),
    [
        ("IA3", "smollm3", CAUSAL, {"self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"}),
        ("IA3", "phi3", CAUSAL, {"self_attn.qkv_proj", "mlp.down_proj"}),
        ("IA3", "camembert", ENCODER, {"attention.self.key", "attention.self.value", "output.dense"}),
        ("IA3", "gpt_oss", CAUSAL, {"self_attn.k_proj", "self_attn.v_proj"}),
        ("IA3", "gemma3", VISION, {"self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"}),
        ("BEFT", "smollm3", CAUSAL, {"self_attn.v_proj"}),
        ("BEFT", "phi3", CAUSAL, {"self_attn.qkv_proj"}),
        ("BEFT", "mamba", CAUSAL, {"mixer.in_proj"}),  # no value: every projection
        (
            "LN_TUNING",
            "smollm3",
            CAUSAL,
            {"input_layernorm", "post_attention_layernorm", "model.norm"},
        ),
        (
            "LN_TUNING",
            "qwen2_5_vl",
            VISION,
            {"input_layernorm", "post_attention_layernorm", "model.language_model.norm"},
        ),
        ("LN_TUNING", "camembert", ENCODER, {"attention.output.LayerNorm", "output.LayerNorm"}),
    ],
)
def test_by_structure_for_other_kinds_of_methods(peft_type, model_type, auto, expected):
    model = empty(model_type, auto)
    config = PeftConfig.from_dict({"peft_type": peft_type})
    assert isinstance(config, LayerConfig)
    found = find_targets(model, config)
    assert endings(found) == expected
    if peft_type == "IA3":
        last = {name for name in expected if name.endswith(("down_proj", "output.dense"))}
        names = resolve(model, config).to_dict()["feedforward_modules"]
        assert endings([path for path in found if path.endswith(tuple(names))] if names else []) == last


def test_feedforward_modules_follow_targets_that_were_named():
    model = empty("bert")
    config = PeftConfig.from_dict({"peft_type": "IA3", "target_modules": ["dense"], "exclude_modules": r"cls\..*"})
    assert isinstance(config, LayerConfig)
    pattern = resolve(model, config).to_dict()["feedforward_modules"]
    theirs = of_peft(model, peft.IA3Config(target_modules=["dense"], exclude_modules=r"cls\..*"))
    assert {path for path in theirs if re.fullmatch(pattern, path)} == {
        path for path, layer in theirs.items() if isinstance(layer, IA3Layer) and layer.is_feedforward
    }


class Mixture(nn.Module):
    """Experts in a list, as remote code has them, with a router that has a layer of its own."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 4))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)) for _ in range(3))
        self.shared = nn.Sequential(nn.Linear(8, 20), nn.Linear(20, 8))
        self.shared_gate = nn.Linear(8, 1)


def test_routers_and_gates_are_told_from_experts_in_a_list():
    model = nn.ModuleDict({"blocks": nn.ModuleList([Mixture(), Mixture()]), "head": nn.Linear(8, 30)})
    expected = {f"experts.{expert}.N" for expert in range(3)} | {"shared.N"}
    assert endings(find_targets(model, LoraConfig())) == expected
    assert len(find_targets(model, LoraConfig(target_modules="all-linear"))) == 2 * (2 + 6 + 2 + 1) + 1


def test_what_is_tied_or_never_called_is_left_out():
    class Block(nn.Module):
        def __init__(self, embedding):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.mlp = nn.Linear(8, 8)
            self.out = nn.Linear(8, 30, bias=False)
            self.out.weight = embedding.weight

    embedding = nn.Embedding(30, 8)
    model = nn.ModuleDict({"embedding": embedding, "blocks": nn.Sequential(Block(embedding), Block(embedding))})
    assert find_targets(model, LoraConfig()) == ["blocks.0.mlp", "blocks.1.mlp"]


def test_adapters_in_the_model_change_nothing():
    model = empty("qwen2_moe")
    before = find_targets(model, LoraConfig())
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"), "first")
    assert find_targets(adapted.get_base_model(), LoraConfig()) == before


def test_a_model_without_norms_says_so():
    config = PeftConfig.from_dict({"peft_type": "LN_TUNING"})
    assert isinstance(config, LayerConfig)
    with pytest.raises(AdapterError, match="none are found in repeated blocks"):
        find_targets(empty("olmo"), config)  # its norms have no weight
