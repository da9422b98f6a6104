"""The plan of a step against what torch's allocator counts in a real one, on tiny models, and what a plan chooses."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from nbtune.data import Example, collate
from nbtune.fused import fused
from nbtune.models import attach_adapter, describe
from nbtune.models.training import precision, prepare_for_training
from nbtune.modules.checkpointing import checkpoint_blocks
from nbtune.plan import HEAP_SHARE, ROOM, plan
from nbtune.plan.estimate import estimated_step
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
    "wide head": transformers.LlamaConfig(**SIZES | {"vocab_size": 80_000}),
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
    ("model", "method"),
    [*(("llama", method) for method in METHODS), ("wide head", "lora"), ("gemma3", "lora"), ("gpt2", "full")],
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


@pytest.fixture(scope="module")
def eight_billion(tmp_path_factory):
    """A config of Llama 3.1 8B's sizes; nothing of it takes memory."""
    folder = tmp_path_factory.mktemp("models") / "llama-8b"
    transformers.LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    (folder / "tokenizer.json").write_text("{}")
    return folder


def large(folder, **training):
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_length": 2048}
    model = {"name": str(folder), "dtype": "bfloat16"}
    return RunSpec(model=model, method={"r": 16}, training=sizes | training)


def test_less_memory_means_smaller_micro_batches_then_more_recomputed_layers(eight_billion):
    spec = large(eight_billion)
    roomy = plan(spec, available_bytes=10**12)
    assert (roomy.micro_batch_size, roomy.accumulation, roomy.checkpointed_layers) == (4, 2, 0)
    assert roomy.chosen == ""
    assert roomy.traced
    plans = [plan(spec, available_bytes=size * 10**9) for size in (120, 60, 45, 30, 28, 26, 24)]
    assert {p.micro_batch_size for p in plans} == {1, 2, 4}
    assert [p.micro_batch_size for p in plans] == sorted((p.micro_batch_size for p in plans), reverse=True)
    assert [p.checkpointed_layers for p in plans] == sorted(p.checkpointed_layers for p in plans)
    assert len({p.checkpointed_layers for p in plans}) > 3
    assert all(p.micro_batch_size == 1 for p in plans if p.checkpointed_layers)
    for p in plans:
        assert p.fits
        assert p.peak_bytes <= ROOM * p.available_bytes
        assert p.micro_batch_size * p.accumulation == 8
        assert p.tokens_per_step == roomy.tokens_per_step
        assert p.packing_length == p.micro_batch_size * 2048
        assert p.parts["base weights"] == roomy.parts["base weights"]
    assert "layers computed again to fit" in plans[-1].chosen
    assert plans[-1].chosen in str(plans[-1])


def test_no_layer_is_recomputed_that_need_not_be(eight_billion):
    spec = large(eight_billion, per_device_train_batch_size=1)
    chosen = plan(spec, available_bytes=25 * 10**9)
    assert 1 < chosen.checkpointed_layers < 31
    weights = weigh(spec, CPU)
    step = planned_step(spec, CPU, weights, 1, recomputed=True)
    fewer = step.peak(chosen.checkpointed_layers - 1, accumulates=True)
    now = step.peak(chosen.checkpointed_layers, accumulates=True)
    more = chosen.peak_bytes + fewer.bytes - now.bytes + HEAP_SHARE * (fewer.passed - now.passed)
    assert more > ROOM * chosen.available_bytes


def test_activations_leave_holes_after_their_own_peak():
    """Full fine-tuning peaks at the end of the backward pass, when activations are gone; their holes are not."""
    one_row = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    short, long = (plan(RunSpec(method="full", training=one_row | {"max_length": length})) for length in (256, 512))
    assert short.parts["activations"] == pytest.approx(long.parts["activations"], rel=0.01)
    assert long.parts["overhead"] > short.parts["overhead"] + 10**7


def test_what_cannot_fit_is_said(eight_billion):
    planned = plan(large(eight_billion), available_bytes=10**10)
    assert not planned.fits
    assert planned.chosen.endswith("which does not suffice")
    assert (planned.micro_batch_size, planned.checkpointed_layers) == (1, 31)


def test_layers_are_recomputed_as_the_spec_says(eight_billion):
    kept = plan(large(eight_billion, gradient_checkpointing=False), available_bytes=25 * 10**9)
    assert (kept.checkpointed_layers, kept.micro_batch_size) == (0, 1)
    assert not kept.fits
    again = plan(large(eight_billion, gradient_checkpointing=True), available_bytes=10**12)
    assert (again.checkpointed_layers, again.micro_batch_size) == (32, 4)
    assert again.parts["activations"] < 0.2 * plan(large(eight_billion), available_bytes=10**12).parts["activations"]


def test_quantised_weights_and_small_optimisers_are_counted(eight_billion):
    spec = large(eight_billion)
    full, half = (plan(spec.updated(**change), available_bytes=10**12) for change in ({}, {"load_in_4bit": True}))
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336)
    assert full.parts["base weights"] - half.parts["base weights"] == pytest.approx(linear * (2 - 0.5625), rel=1e-6)
    small = plan(spec.updated(optim="adamw_8bit"), available_bytes=10**12)
    assert small.parts["optimiser"] < 0.27 * full.parts["optimiser"]
    frozen = plan(spec.updated(optim="lorafa"), available_bytes=10**12)
    assert frozen.trained_parameters < 0.6 * full.trained_parameters


def test_time_grows_with_tokens_and_with_recomputing(eight_billion):
    seconds = [
        plan(large(eight_billion, max_steps=10, **change), available_bytes=10**12).seconds
        for change in ({}, {"gradient_accumulation_steps": 4}, {"gradient_checkpointing": True})
    ]
    assert seconds[1] == pytest.approx(2 * seconds[0], rel=0.7)  # the rate is measured each time
    assert seconds[2] > seconds[0]


def test_the_estimate_for_what_cannot_be_traced_is_of_the_right_size(eight_billion):
    spec = large(eight_billion)
    weights = weigh(spec, CPU)
    traced = planned_step(spec, CPU, weights, 1, recomputed=True)
    estimated = estimated_step(describe(spec.model), weights, 2048, itemsize=2)
    for checkpointed in (0, 32):
        ratio = estimated.peak(checkpointed, False).bytes / traced.peak(checkpointed, False).bytes
        assert 0.5 < ratio < 2.5
        assert 0.5 < estimated.flops(checkpointed) / traced.flops(checkpointed) < 2
    assert not estimated.traced


def test_a_run_in_a_new_process_is_not_charged_with_what_this_one_holds(monkeypatch):
    monkeypatch.setattr(importlib.import_module("nbtune.plan"), "_memory", lambda device: (9 * 10**9, 20 * 10**9))
    here, elsewhere = plan(RunSpec()), plan(RunSpec(), in_new_process=True)
    assert here.parts["overhead"] > 9 * 10**9 > 5 * 10**9 > elsewhere.parts["overhead"]
    assert (here.available_bytes, elsewhere.available_bytes) == (20 * 10**9, 11 * 10**9)
