"""The plan of a step against what torch's allocator counts in a real one, on tiny models, and what a plan chooses."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from nbtune.data import Example, collate
from nbtune.fused import fused
from nbtune.models import attach_adapter
from nbtune.models.training import precision, prepare_for_training
from nbtune.modules.checkpointing import checkpoint_blocks
from nbtune.plan.model import step as planned_step
from nbtune.plan.model import weigh
from nbtune.spec import RunSpec
from nbtune.train.loss import CausalLMLoss

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
GPT2 = {"vocab_size": 512, "n_embd": 64, "n_layer": 5, "n_head": 4, "n_positions": 256}
MODELS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, sliding_window=16, layer_types=["sliding_attention"] * 5),
    "gpt2": transformers.GPT2Config(**GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}
METHODS = {
    "lora": {"r": 4, "lora_dropout": 0.1},
    "some layers": {"r": 4, "layers_to_transform": [1, 4], "layers_pattern": "layers"},
    "dora": {"r": 4, "use_dora": True},
    "oft": {"peft_type": "OFT", "oft_block_size": 8},
    "vera": {"peft_type": "VERA", "r": 16},
    "ia3": {"peft_type": "IA3"},
    "prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4},
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4},
    "saved head": {"r": 4, "modules_to_save": ["lm_head"]},
    "full": "full",
}
ROWS, LENGTH = 3, 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Configs of models; a plan reads no more of them."""
    made = {}
    for name, config in MODELS.items():
        made[name] = tmp_path_factory.mktemp("models") / name
        config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
        config.save_pretrained(made[name])
        (made[name] / "tokenizer.json").write_text("{}")
    return made


def spec_of(folder, method, **training):
    sizes = {"per_device_train_batch_size": ROWS, "max_length": LENGTH, "max_steps": 3}
    model = {"name": str(folder), "dtype": "float32"}
    return RunSpec(model=model, method=METHODS[method], training=sizes | training)


def allocated(model: transformers.PreTrainedModel, dtype: torch.dtype, path) -> int:
    """Bytes that torch's CPU allocator holds at most during a step, above what is there before."""
    loss_model = CausalLMLoss(model)
    ids = torch.arange(1, LENGTH + 1).numpy()
    batch = collate([[Example(ids, ids)]] * ROWS)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)

    def one_step() -> None:
        with precision(model, "cpu", dtype):
            loss = loss_model(
                batch.input_ids, batch.labels, batch.position_ids, batch.cu_seq_lens, batch.max_length
            ).loss  # fmt: skip
        loss.backward()

    one_step()  # buffers that are made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        one_step()
    profiler.export_chrome_trace(str(path))
    moments = [event["args"] for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    totals = [(moment["Total Allocated"], moment["Bytes"]) for moment in moments]
    return max(total for total, _ in totals) - (totals[0][0] - totals[0][1])


def real(spec: RunSpec, checkpointed: int) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(spec.model.name)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    prepare_for_training(model)
    checkpoint_blocks(model, checkpointed)
    if spec.method != "full":
        attach_adapter(model, spec)
    return model.train()


@pytest.mark.parametrize("checkpointed", [0, 2, 5])
@pytest.mark.parametrize(
    ("model", "method"), [*(("llama", method) for method in METHODS), ("gemma3", "lora"), ("gpt2", "full")]
)
def test_the_planned_peak_of_a_step_is_what_torch_allocates(model, method, checkpointed, folders, tmp_path):
    spec = spec_of(folders[model], method)
    weights = weigh(spec, CPU)
    planned = planned_step(spec, CPU, weights, ROWS, recomputed=checkpointed > 0).peak(checkpointed, accumulates=True)
    built = real(spec, checkpointed)
    with fused(built):
        measured = allocated(built, torch.float32, tmp_path / "trace.json")
    assert planned.activations + planned.loss == pytest.approx(measured, rel=0.03)
    assert planned.gradients == sum(p.numel() * 4 for p in built.parameters() if p.requires_grad)
