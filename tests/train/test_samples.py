"""Samples of the real 135M model: what is asked, what is answered, and that the model notices nothing."""

from __future__ import annotations

import pytest
import torch

from nbtune.data import Example, encode
from nbtune.fused import fused
from nbtune.infer.engine import Engine
from nbtune.infer.sampling import Sampling
from nbtune.infer.text import prompt_tokens
from nbtune.kernels.attention import NAME
from nbtune.models import load, load_tokenizer
from nbtune.peft import LoraConfig, get_peft_model
from nbtune.spec import ModelSpec, TrainingSpec
from nbtune.train import samples as samples_module
from nbtune.train.samples import MAX_NEW_TOKENS, SHOWN_CHARACTERS, Sampler, questions

CHATS = [
    ("What is the capital of France?", "Paris."),
    ("Name three colours of the rainbow and say a word about each.", "Red is warm, green is calm, blue is deep."),
    ("Hi", "Hello."),
]  # fmt: skip
FP32 = ModelSpec(dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FP32)


@pytest.fixture(scope="module")
def rows(tokenizer) -> list[Example]:
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in CHATS]
    return [encode(chat, tokenizer)[0] for chat in chats]


def asked(rows, tokenizer, count=3, **training):
    return questions(TrainingSpec(eval_samples=count, **training), rows, tokenizer)


def test_a_question_is_the_row_up_to_its_answer_and_reads_as_the_person_wrote_it(rows, tokenizer):
    found = asked(rows, tokenizer)
    assert [(question.text, question.reference) for question in found] == CHATS
    for question, (text, _) in zip(found, CHATS, strict=True):
        assert question.ids == prompt_tokens([{"role": "user", "content": text}], tokenizer)


def test_ones_own_come_first_and_have_no_reference(rows, tokenizer):
    found = asked(rows, tokenizer, 1, sample_prompts=["Who are you?"])
    assert [(question.text, question.reference) for question in found] == [("Who are you?", ""), CHATS[0]]


def test_they_are_spread_over_the_held_out_rows(rows, tokenizer):
    assert [question.text for question in asked(rows * 4, tokenizer, 4)] == [CHATS[0][0]] * 4
    assert len(asked(rows, tokenizer, 16)) == 3
    assert asked(rows, tokenizer, 0) == asked([], tokenizer) == []


def test_a_longer_chat_is_asked_its_first_question(tokenizer):
    chat = [{"role": role, "content": text} for role, text in (
        ("system", "Be brief."), ("user", "One?"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "Four."),
    )]  # fmt: skip
    (question,) = asked(encode(chat, tokenizer), tokenizer)
    assert question.ids == prompt_tokens(chat[:2], tokenizer)
    assert "Be brief." in question.text
    assert "One?" in question.text
    assert question.reference == "Two."


def test_a_row_that_is_all_text_is_given_in_part(tokenizer):
    ids = torch.tensor(tokenizer(" ".join(["word"] * 40))["input_ids"]).int().numpy()
    (question,) = asked([Example(ids, ids)], tokenizer)
    assert question.ids == ids[:16].tolist()
    assert question.reference.split() == ["word"] * (len(ids) - 16)


def test_what_is_kept_of_a_long_text_is_bounded(tokenizer):
    chat = [{"role": "user", "content": "why " * 900}, {"role": "assistant", "content": "so " * 900}]
    (question,) = asked(encode(chat, tokenizer), tokenizer)
    assert len(question.text) == len(question.reference) == SHOWN_CHARACTERS
    assert question.text.endswith("…")


@pytest.fixture(scope="module")
def trained(tokenizer):
    """The model as the loop has it: fused, on packed attention, with an adapter that changes its answers."""
    model = load(FP32, for_training=True).model
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return model, adapted


def test_a_batch_answers_as_the_engine_does_alone(trained, rows, tokenizer, tmp_path, monkeypatch):
    model, adapted = trained
    monkeypatch.setattr(samples_module, "MAX_SECONDS", 1000.0)
    adapted.save_pretrained(tmp_path)
    engine = Engine(FP32, {"tuned": tmp_path})
    expected = []
    for text, _ in CHATS:
        stream = engine.stream(
            {"tuned": [{"role": "user", "content": text}]}, Sampling(temperature=0.0), max_new_tokens=MAX_NEW_TOKENS
        )
        expected.append("".join(delta.text for delta in stream).strip())
    engine.close()
    with fused(model):
        samples = Sampler(model, adapted, asked(rows, tokenizer), tokenizer, lambda: False).samples()
    assert [sample["answer"] for sample in samples] == expected
    assert len(set(expected)) == 3


def test_the_model_and_the_random_numbers_are_as_they_were(trained, rows, tokenizer):
    model, adapted = trained
    model.train()
    model.get_decoder().layers[3].eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    with fused(model):
        forwards = [module.__dict__.get("forward") for module in model.modules()]
        Sampler(model, adapted, asked(rows, tokenizer, 1), tokenizer, lambda: False).samples()
        assert [module.__dict__.get("forward") for module in model.modules()] == forwards
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == NAME
    model.train()


def test_answers_that_take_too_long_are_cut(trained, rows, tokenizer, monkeypatch):
    model, adapted = trained
    monkeypatch.setattr(samples_module, "MAX_SECONDS", 0.0)
    samples = Sampler(model, adapted, asked(rows, tokenizer), tokenizer, lambda: False).samples()
    assert all(len(tokenizer(sample["answer"])["input_ids"]) <= 1 for sample in samples)


def test_asked_to_stop_it_ends_at_once(trained, rows, tokenizer):
    model, adapted = trained
    calls = []

    def should_stop():
        calls.append(1)
        return len(calls) >= 2

    assert Sampler(model, adapted, asked(rows, tokenizer), tokenizer, should_stop).samples() == []
    assert len(calls) == 3  # two tokens, and why it ended
    assert Sampler(model, adapted, [], tokenizer, lambda: False).samples() == []
