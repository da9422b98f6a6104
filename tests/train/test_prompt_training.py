"""Prompts before packed examples: as if each example had been computed alone, on tiny models and in real runs."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy
import peft
import pytest
import torch
import transformers

import nbtune as nt
from nbtune.data import Batches
from nbtune.data.render import Example
from nbtune.kernels.attention import NAME, register
from nbtune.models import attach_adapter, load, load_tokenizer, skeleton
from nbtune.peft import LoraConfig, PeftModel, get_peft_model
from nbtune.peft.configs.prompts import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from nbtune.spec import ModelSpec, RunSpec
from nbtune.train.loss import CausalLMLoss
from nbtune.train.session import train_in_folder

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
ARCHITECTURES = {
    "Llama": SIZES,
    # Of the prefix of 5 keys a window of 4 shows its last 3 to the first token, and none to the fourth.
    "Gemma3Text": {**SIZES, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    | {"num_hidden_layers": 4, "final_logit_softcapping": 5.0},
    "GPT2": {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
CONFIGS = {
    "prompt": PromptTuningConfig(num_virtual_tokens=5),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16),
    "prefix": PrefixTuningConfig(num_virtual_tokens=5),
    "projected prefix": PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16),
}
LENGTHS = [5, 1, 9, 7]


def adapted_model(architecture: str, config) -> PeftModel:
    register()
    torch.manual_seed(0)
    kind = getattr(transformers, f"{architecture}Config")(**ARCHITECTURES[architecture])
    model = transformers.AutoModelForCausalLM.from_config(kind, attn_implementation="sdpa")
    return get_peft_model(model, config)


def packed_row(seed: int = 1) -> dict:
    """Four examples in a row, the first token of each and some others without a label."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(64, (1, sum(LENGTHS)), generator=generator)
    labels = torch.where(torch.rand(input_ids.shape, generator=generator) < 0.3, -100, input_ids)
    borders = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    labels[0, borders[:-1].long()] = -100
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "cu_seq_lens": borders,
        "max_length": max(LENGTHS),
    }


def one_at_a_time(model: PeftModel, row: dict) -> torch.Tensor:
    """The loss of each example alone by PeftModel.forward, weighted by its labels."""
    model.get_base_model().set_attn_implementation("sdpa")
    parts = zip(row["input_ids"].split(LENGTHS, 1), row["labels"].split(LENGTHS, 1), strict=True)
    counted = [(model(ids, labels=labels).loss, (labels[:, 1:] != -100).sum()) for ids, labels in parts]
    return sum(loss * count for loss, count in counted if count) / sum(count for _, count in counted)


def packed_loss(model: PeftModel, row: dict) -> torch.Tensor:
    model.get_base_model().set_attn_implementation(NAME)
    return CausalLMLoss(model.get_base_model())(**row).loss


def gradients(model: PeftModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", CONFIGS)
def test_a_packed_row_is_each_example_alone(architecture, method):
    model, row = adapted_model(architecture, CONFIGS[method]).train(), packed_row()
    expected = one_at_a_time(model, row)
    wanted = gradients(model, expected)
    loss = packed_loss(model, row)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    found = gradients(model, loss)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-5, msg=name)
    with model.disable_adapter():
        assert abs(packed_loss(model, row).item() - loss.item()) > 1e-3


@pytest.mark.parametrize("method", CONFIGS)
def test_ten_steps_lower_the_loss(method):
    model, row = adapted_model("Llama", CONFIGS[method]).train(), packed_row()
    before = copy.deepcopy(model.get_base_model().model.layers[0].state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = packed_loss(model, row)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    after = model.get_base_model().model.layers[0].state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("method", CONFIGS)
def test_gradient_checkpointing_changes_nothing(method):
    model, row = adapted_model("Llama", CONFIGS[method]).train(), packed_row()
    expected = packed_loss(model, row)
    wanted = gradients(model, expected)
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    loss = packed_loss(model, row)
    assert loss.item() == expected.item()
    for name, gradient in gradients(model, loss).items():
        assert torch.equal(gradient, wanted[name]), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_the_logits_are_verified_with_the_prompt(architecture, method):
    model, row = adapted_model(architecture, CONFIGS[method]).eval(), packed_row()
    model.get_base_model().set_attn_implementation(NAME)
    row.pop("labels")
    CausalLMLoss(model.get_base_model()).verify(**row)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_prompt_and_low_rank_updates_are_active_together(method):
    model, row = adapted_model("Llama", CONFIGS[method]).train(), packed_row()
    model.add_adapter("low_rank", LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.set_adapter(["default", "low_rank"])
    expected = one_at_a_time(model, row)
    wanted = gradients(model, expected)
    for name, gradient in gradients(model, packed_loss(model, row)).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-5, msg=name)


SMOLLM2 = ModelSpec(dtype="float32")
ROWS = [
    {"instruction": f"Say the number {n} in English.", "output": word}
    for n, word in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())
]
TRAINING = {
    "max_steps": 3, "max_length": 64, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
    "eval_steps": 0, "eval_samples": 0, "save_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
}  # fmt: skip


def run_spec(method, model: str | ModelSpec = SMOLLM2, **training) -> RunSpec:
    return RunSpec(
        model=model,
        data=nt.DataSpec.from_rows(ROWS, eval_fraction=0.2),
        method=method,
        training=TRAINING | training,
        tracking={"mlflow": False},
    )


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    """The real tokenizer on two small random layers."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = load_tokenizer(SMOLLM2)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 80})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "method",
    [
        PromptTuningConfig(num_virtual_tokens=8, prompt_tuning_init="TEXT", prompt_tuning_init_text="Numbers:"),
        PrefixTuningConfig(num_virtual_tokens=8),
    ],
    ids=["prompt", "prefix"],
)
def test_a_run_trains_a_prompt_that_peft_loads(method, tmp_path):
    run = nt.train(run_spec(method), runs_dir=tmp_path).wait()
    assert run.status == "finished"
    losses = [event["loss"] for event in run.events() if event["type"] == "train"]
    assert losses[-1] < losses[0]
    config = peft.PeftConfig.from_pretrained(run.adapter_path)
    assert config.num_virtual_tokens == 8
    if isinstance(method, PromptTuningConfig):
        assert config.tokenizer_name_or_path == config.base_model_name_or_path == "smollm2-135m-instruct"

    ids = torch.arange(100, 120)[None]
    model = load(SMOLLM2).model
    with torch.no_grad():
        base = model(ids).logits
        ours = PeftModel.from_pretrained(model, run.adapter_path)
        mine = ours(ids).logits
        ours.unload()
        theirs = peft.PeftModel.from_pretrained(model, run.adapter_path)
        torch.testing.assert_close(mine, theirs(ids).logits, rtol=1e-5, atol=2e-4)
    assert (mine[:, -20:] - base).abs().max() > 1e-2


def test_the_text_is_read_by_the_models_own_tokenizer(tiny_folder):
    method = PromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="TEXT", prompt_tuning_init_text="one two")
    model = load(ModelSpec(name=str(tiny_folder), dtype="float32")).model
    ids = load_tokenizer(SMOLLM2)("one two")["input_ids"]
    embeddings = model.get_input_embeddings().weight[torch.tensor([*ids, *ids])[:3]]
    spec = run_spec(method, str(tiny_folder))
    adapted = attach_adapter(model, spec)
    assert torch.equal(next(p for p in adapted.parameters() if p.requires_grad), embeddings)
    assert nt.check(spec) == []


@pytest.mark.parametrize(
    "method",
    [
        PromptTuningConfig(num_virtual_tokens=4),
        PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8),
        PromptEncoderConfig(num_virtual_tokens=4, encoder_reparameterization_type="LSTM", encoder_dropout=0.2),
    ],
    ids=["prompt", "prefix", "p-tuning"],
)
def test_stopped_and_resumed_is_bit_identical_to_uninterrupted(method, tiny_folder, tmp_path):
    spec = run_spec(method, str(tiny_folder), gradient_checkpointing=True)
    losses: dict[str, list[float]] = {"whole": [], "parts": []}

    def train(name: str, until: int) -> None:
        def on_event(event):
            if event["type"] == "train":
                losses[name].append(event["loss"])

        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        train_in_folder(folder, spec, on_event=on_event, should_stop=lambda: len(losses[name]) >= until)

    train("whole", 99)
    train("parts", 1)
    assert len(losses["parts"]) == 1
    train("parts", 99)
    assert losses["parts"] == losses["whole"]
    assert len(losses["whole"]) == 3
    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in losses]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_planned_from_shapes_alone(config):
    spec = run_spec(config)
    model = get_peft_model(skeleton(SMOLLM2), config)
    trained, _ = model.get_nb_trainable_parameters()
    theirs = peft.get_peft_model(load(SMOLLM2).model, oracle(config)).get_nb_trainable_parameters()[0]
    planned, of_lora = nt.plan(spec), nt.plan(run_spec(LoraConfig(r=1)))
    assert trained == theirs == planned.trained_parameters
    longer = 64 if isinstance(config, PrefixTuningConfig) else 64 + 5  # a prefix stands beside the rows, not in them
    assert planned.parts["activations"] / of_lora.parts["activations"] == pytest.approx(longer / 64, rel=2e-3)


def oracle(config) -> peft.PeftConfig:
    kinds = {"PROMPT_TUNING": peft.PromptTuningConfig, "PREFIX_TUNING": peft.PrefixTuningConfig}
    settings = {**config.changes(), "task_type": "CAUSAL_LM"}
    return kinds.get(config.peft_type, peft.PromptEncoderConfig)(**settings)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (PromptTuningConfig(num_virtual_tokens=20), "Set max_length to 60 or less"),
        (PrefixTuningConfig(num_virtual_tokens=20), "20 virtual tokens"),
        (PromptTuningConfig(num_virtual_tokens=8, token_dim=5), "token_dim"),
        (
            PromptTuningConfig(
                num_virtual_tokens=8,
                prompt_tuning_init="TEXT",
                prompt_tuning_init_text="x",
                tokenizer_name_or_path="/nowhere",
            ),
            "No tokenizer",
        ),
    ],
)
def test_what_cannot_work_is_a_problem_before_work_starts(method, words, tiny_folder):
    problems = nt.check(run_spec(method, str(tiny_folder)))
    assert len(problems) == 1
    assert words in str(problems[0])
    assert nt.check(run_spec(PromptTuningConfig(num_virtual_tokens=16), str(tiny_folder))) == []


def test_rows_have_room_for_the_prompts():
    lengths = [10] * 20 + [64, 30, 3]
    examples = [Example(numpy.zeros(n, numpy.int32), numpy.zeros(n, numpy.int32)) for n in lengths]
    rows = [row for batch in Batches(examples, 2, 64, virtual_tokens=6).epoch(0) for row in batch]
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sizes = [sum(lengths[index] + 6 for index in row) for row in rows]
    assert max(sizes) == 70
    assert any(len(row) > 1 for row in rows)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_bfloat16_base_stays_bfloat16(method):
    model, row = adapted_model("Llama", CONFIGS[method]).train(), packed_row()
    expected = packed_loss(model, row).item()
    base = model.get_base_model()
    for name, parameter in base.named_parameters():
        parameter.data = parameter.data if ".adapters." in name else parameter.data.to(torch.bfloat16)
    loss = packed_loss(model, row)
    assert loss.item() == pytest.approx(expected, rel=0.02)
    assert all(gradient.dtype is torch.float32 for gradient in gradients(model, loss).values())
