"""Chat templates: the standard ones, what is said of others, and that a run trains and keeps what it was given."""

from __future__ import annotations

import copy
import time

import pytest
import templates
from pydantic import ValidationError

from nbtune.chat_templates import STANDARD, chat_template
from nbtune.data import Chat, check_template, encode, load_examples, read_rows
from nbtune.data.packing import IGNORED
from nbtune.data.report import report
from nbtune.errors import DataError
from nbtune.models import load_tokenizer
from nbtune.models.sandbox import require_bounded
from nbtune.spec import DataSpec, ModelSpec, RunSpec

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]
LLAMA = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
WRITTEN = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n"
    "<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n",
    "llama3": "<s>" + "".join(LLAMA.format(message["role"], message["content"]) for message in CHAT),
    "gemma": "<s><start_of_turn>user\nBe brief.\n\nQ1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
    "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\nA2<end_of_turn>\n",
    "mistral": "<s>[INST] Be brief.\n\nQ1 [/INST] A1</s>[INST] Q2 [/INST] A2</s>",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\nQ1<|end|>\n<|assistant|>\nA1<|end|>\n<|user|>\nQ2<|end|>\n"
    "<|assistant|>\nA2<|end|>\n",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nQ1</s>\n<|assistant|>\nA1</s>\n<|user|>\nQ2</s>\n"
    "<|assistant|>\nA2</s>\n",
}


@pytest.mark.parametrize("name", STANDARD)
def test_what_the_standard_templates_write(smollm_tokenizer, name):
    text = smollm_tokenizer.apply_chat_template(
        CHAT, chat_template=chat_template(name), tokenize=False, bos_token="<s>", eos_token="</s>"
    )
    assert text == WRITTEN[name]


def test_names():
    assert ModelSpec(chat_template="chatml").chat_template == "chatml"
    assert ModelSpec(chat_template="").chat_template is None
    with pytest.raises(ValidationError, match="there are chatml, llama3, gemma, mistral, phi3, zephyr"):
        ModelSpec(chat_template="chatlm")
    spec = RunSpec(model={"chat_template": templates.MARKED})
    assert RunSpec.from_dict(spec.to_dict()) == spec


def test_the_tokenizer_has_the_template_of_the_spec():
    assert load_tokenizer(ModelSpec(chat_template="zephyr")).chat_template == chat_template("zephyr")
    assert load_tokenizer(ModelSpec(chat_template=templates.MARKED)).chat_template == templates.MARKED
    assert "SmolLM" in load_tokenizer(ModelSpec()).chat_template


@pytest.mark.parametrize("name", ["chatml", "mistral"])
def test_nothing_is_said_of_a_template_that_suits(smollm_tokenizer, name):
    assert check_template(name, smollm_tokenizer) == []
    assert check_template(smollm_tokenizer.chat_template, smollm_tokenizer) == []


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("llama3", "<|eot_id|> is no token of this model"),
        ("phi3", "does not end with a token at which generation stops"),
        (templates.PLAIN, "does not end with a token at which generation stops"),
        (templates.FORGETFUL, "writes earlier answers differently"),
        (templates.CHATML.replace("message['role'] + '\n' + message['content']", "message['role'] + '\n' + "
         "(message['content'] if message['role'] != 'system' else '')"), "does not show what the system says"),
    ],
)  # fmt: skip
def test_what_is_unwise_is_a_warning(smollm_tokenizer, template, expected):
    messages = [m | {"content": f"<think>x</think>{m['content']}"} if m["role"] == "assistant" else m for m in CHAT]
    found = check_template(template, smollm_tokenizer, Chat(messages))
    assert expected in " ".join(finding.title for finding in found)
    assert {finding.severity for finding in found} == {"warning"}


def test_no_such_template(smollm_tokenizer):
    (finding,) = check_template("chatlm", smollm_tokenizer)
    assert (finding.severity, finding.title) == ("error", "There is no such chat template")


def test_a_template_that_never_ends_is_refused_once_and_for_all():
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{{ '' }}{% endfor %}{% endfor %}"
    start = time.perf_counter()
    with pytest.raises(DataError, match="does not come to an end"):
        require_bounded(endless)
    assert time.perf_counter() - start < 5
    start = time.perf_counter()
    with pytest.raises(DataError, match="does not come to an end"):
        require_bounded(endless)
    assert time.perf_counter() - start < 0.01


def test_base_models_get_a_standard_template(smollm_tokenizer):
    base = copy.deepcopy(smollm_tokenizer)
    base.chat_template = None
    spec = DataSpec.from_rows([{"messages": CHAT}] * 3)
    with pytest.raises(DataError, match=r"model\.chat_template"):
        load_examples(spec, base, 64)
    base.chat_template = chat_template("mistral")
    (example,) = encode(CHAT, base)
    assert base.decode(example.labels[example.labels != IGNORED]) == " A1<|im_end|> A2<|im_end|>"


@pytest.mark.sample_data
def test_functions_need_a_template_that_writes_them(smollm_tokenizer, samples):
    spec = DataSpec(source=str(samples / "glaive_toolcall_en_demo.json"))
    with pytest.raises(DataError, match="does not") as caught:
        load_examples(spec, smollm_tokenizer, 512)
    assert "the standard chatml does" in caught.value.message
    tokenizer = load_tokenizer(ModelSpec(chat_template="chatml"))
    data = load_examples(spec, tokenizer, 2048)
    assert len(data.train) + len(data.eval) + sum(data.dropped.values()) == 300
    assert sum(data.dropped.values()) <= 1  # longer than 2,048 tokens before its answer
    rows = read_rows(spec)
    index = next(i for i, chat in enumerate(rows.train) if any("tool_calls" in m for m in chat.messages))
    pieces = report(spec, tokenizer, 2048).pieces(index)
    trained = "".join(piece.text for piece in pieces if piece.kind != "context")
    assert '<tool_call>\n{"name": "' in trained
    assert "</tool_call><|im_end|>" in trained
    context = "".join(piece.text for piece in pieces if piece.kind == "context")
    assert "<tools>" in context
    assert "<|im_start|>tool\n" in context


# Text to go on with


@pytest.mark.sample_data
@pytest.mark.parametrize("name", ["wiki_demo.txt", "c4_demo.jsonl"])
def test_texts_are_split_and_wholly_trained(smollm_tokenizer, samples, name):
    spec = DataSpec(source=str(samples / name))
    data = load_examples(spec, smollm_tokenizer, 256)
    rows = read_rows(spec)
    assert data.cut == 0
    assert not data.dropped
    assert len(data.train) > len(rows.train)
    assert max(map(len, data.train)) == 256
    ids, starts = [], 0
    for example in data.train:
        assert (example.labels == example.input_ids).all()
        again = bool(ids) and ids[-1] != smollm_tokenizer.eos_token_id  # goes on with a text, from its last token
        assert not again or example.input_ids[0] == ids[-1]
        ids += example.input_ids[again:].tolist()
        starts += not again
    assert starts == len(rows.train)
    assert smollm_tokenizer.decode(ids) == "".join(chat.messages[0]["content"] + "<|im_end|>" for chat in rows.train)
    found = report(spec, smollm_tokenizer, 256)
    assert found.form == "text"
    assert found.longer == sum(found.lengths > 256) > 10
    assert {piece.kind for piece in found.pieces(0)} == {"trained", "end"}


def test_texts_and_chats_in_one_mix(smollm_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("Once upon a time")
    spec = DataSpec.from_rows([{"messages": CHAT}], mix=[{"source": str(tmp_path / "a.txt")}], eval_fraction=0)
    data = load_examples(spec, smollm_tokenizer, 128)
    first, second = (smollm_tokenizer.decode(example.input_ids) for example in data.train)
    assert first.startswith("<|im_start|>system\nBe brief.")
    assert second == "Once upon a time<|im_end|>"
