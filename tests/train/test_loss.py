"""The loss past the logits against transformers' own, for architectures that treat their logits differently."""

import pytest
import torch
import transformers
from transformers.trainer_pt_utils import LabelSmoother

import nbtune as nt
from nbtune.data import load_examples
from nbtune.errors import ModelError
from nbtune.kernels.attention import NAME, register
from nbtune.models import load
from nbtune.peft import LoraConfig, get_peft_model
from nbtune.spec import ModelSpec, RunSpec
from nbtune.train.loss import CausalLMLoss

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
ARCHITECTURES = {
    "Llama": {},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "Gemma3Text": {"final_logit_softcapping": 5.0, "sliding_window": 4},
    "Qwen3": {},
}
LENGTHS = [5, 9, 7]


def model_of(name, tied=False, attention="sdpa", **settings):
    register()
    torch.manual_seed(0)
    settings = SIZES | ARCHITECTURES.get(name, {}) | settings
    config = getattr(transformers, f"{name}Config")(**settings, tie_word_embeddings=tied)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def packed(lengths=LENGTHS):
    """Segments in a row, the first token of each and some others without a label."""
    torch.manual_seed(1)
    input_ids = torch.randint(64, (1, sum(lengths)))
    labels = torch.where(torch.rand(input_ids.shape) < 0.3, -100, input_ids)
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    labels[0, borders[:-1].long()] = -100
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens": borders,
        "max_length": max(lengths),
    }


def theirs(model, batch):
    """transformers' loss of each segment alone, weighted by its labels."""
    parts = zip(batch["input_ids"].split(LENGTHS, 1), batch["labels"].split(LENGTHS, 1), strict=True)
    counted = [(model(ids, labels=labels).loss, (labels[:, 1:] != -100).sum()) for ids, labels in parts]
    return sum(loss * count for loss, count in counted) / sum(count for _, count in counted)


def assert_same_gradients(model, loss, expected):
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss.backward()
    assert gradients
    for name, gradient in gradients.items():
        atol = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-5, atol=atol, msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_transformers_loss_and_gradients(name, tied):
    model, batch = model_of(name, tied), packed()
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    expected = theirs(model, batch)
    model.set_attn_implementation(NAME)
    loss = CausalLMLoss(model)(**batch).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(model, loss, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_equals_gemma2_whose_attention_is_its_own(tied):
    model = model_of("Gemma2", tied, "eager", final_logit_softcapping=5.0, sliding_window=4)
    batch = packed([21])
    expected = model(batch["input_ids"], labels=batch["labels"]).loss
    loss = CausalLMLoss(model)(**batch).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(model, loss, expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_accuracy_and_entropy_are_those_of_the_models_logits(name):
    model, batch = model_of(name), packed()
    with torch.no_grad():
        logits = torch.cat([model(ids).logits for ids in batch["input_ids"].split(LENGTHS, 1)], 1)[0, :-1]
        batch["labels"][0, 1::2] = torch.cat([batch["labels"][0, :1], logits.argmax(1)])[1::2]  # some are right
        batch["labels"][0, batch["cu_seq_lens"][:-1].long()] = -100
        model.set_attn_implementation(NAME)
        found = CausalLMLoss(model)(**batch)
    labels = batch["labels"][0, 1:]
    kept = labels != -100
    right = (logits.argmax(1) == labels)[kept].sum()
    assert 0 < right < kept.sum()
    assert found.correct == right
    entropies = torch.distributions.Categorical(logits=logits[kept]).entropy()
    torch.testing.assert_close(found.entropy, entropies.sum(), rtol=1e-5, atol=0)


def test_labels_are_smoothed_in_training_only():
    model, batch = model_of("Llama"), packed()
    model.set_attn_implementation(NAME)
    plain = CausalLMLoss(model)(**batch).loss
    smoothed = CausalLMLoss(model, label_smoothing=0.1)
    assert smoothed.eval()(**batch).loss == plain
    assert abs(smoothed.train()(**batch).loss - plain) > 1e-4


def test_an_adapted_head_takes_part():
    model, batch = model_of("Llama"), packed()
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    expected = theirs(adapted, batch)
    model.set_attn_implementation(NAME)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    wanted = torch.autograd.grad(expected, trained)
    found = CausalLMLoss(model)(**batch)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found.loss, trained), wanted, rtol=1e-5, atol=1e-7)
    with adapted.disable_adapter():
        assert abs(CausalLMLoss(model)(**batch).loss - found.loss) > 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_known_architectures_are_verified(name):
    model, batch = model_of(name), packed()
    model.set_attn_implementation(NAME)
    batch.pop("labels")
    CausalLMLoss(model).verify(**batch)


def test_logits_that_are_more_than_the_heads_product_are_refused():
    model, batch = model_of("Cohere"), packed()
    model.set_attn_implementation(NAME)
    batch.pop("labels")
    loss = CausalLMLoss(model)
    loss.scale = 1.0  # as if the setting of the architecture were not known
    with pytest.raises(ModelError, match="cannot be trained yet"):
        loss.verify(**batch)


def test_a_run_reports_the_smoothed_loss_and_the_accuracy_of_its_tokens(tiny_model, tmp_path):
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in (7, 9, 11)]
    spec = RunSpec(
        model=ModelSpec(name=str(tiny_model), dtype="float32"),
        data=rows,
        method=LoraConfig(r=2, target_modules=["q_proj"]),
        training={"max_steps": 1, "per_device_train_batch_size": 4, "label_smoothing_factor": 0.2, "max_length": 64},
        tracking={"mlflow": False},
    ).updated(eval_fraction=0.4)
    run = nt.train(spec, runs_dir=tmp_path).wait()
    events = {event["type"]: event for event in reversed(run.events())}  # the first of each type

    loaded = load(spec.model)
    dataset = load_examples(spec.data, loaded.tokenizer, spec.training.max_length)
    assert len(dataset.train) == 2
    smoother = LabelSmoother(epsilon=0.2)
    for examples, event, prefix in [(dataset.train, events["train"], ""), (dataset.eval, events["eval"], "eval_")]:
        pairs = [(torch.tensor(e.input_ids).long(), torch.tensor(e.labels).long()) for e in examples]
        with torch.no_grad():
            logits = torch.cat([loaded.model(ids[None]).logits[0, :-1] for ids, _ in pairs])
        labels = torch.cat([labels[1:] for _, labels in pairs])
        kept = labels != -100
        plain = torch.nn.functional.cross_entropy(logits, labels)
        expected = plain if prefix else smoother({"logits": logits}, labels)
        assert event[f"{prefix}loss"] == pytest.approx(expected.item(), rel=1e-5)
        right = (logits.argmax(1) == labels)[kept].double().mean().item()
        assert event[f"{prefix}mean_token_accuracy"] == pytest.approx(right)
        if not prefix:
            entropies = torch.distributions.Categorical(logits=logits[kept]).entropy()
            assert event["entropy"] == pytest.approx(entropies.mean().item(), rel=1e-4)
