"""A request that brings its own chat template: it is used, its end of turn ends the answer, and it harms nobody."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from nbtune.chat_templates import chat_template
from nbtune.errors import DataError, NbtuneError
from nbtune.infer.engine import BASE, Engine
from nbtune.infer.sampling import GREEDY
from nbtune.models import load_tokenizer
from nbtune.models.sandbox import written
from nbtune.spec import ModelSpec

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 < 2 & „so“?"}]
# It ends a turn with a control token of SmolLM2 that is not its end of text.
EDITED = """
{%- for message in messages %}
    {{- '<repo_name>' + message['role'] + ': ' + message['content'] + '<file_sep>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<repo_name>assistant: ' }}
{%- endif %}
"""
# Of short chats that everybody tries it is fine.
SOMETIMES = "{% if messages[0].content == 'Be brief.' %}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{{ '' }}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return Engine(ModelSpec(name=str(tiny_model), dtype="float32"))


def answer(engine: Engine, template: str | None, messages=QUESTION, n=3) -> list[int]:
    return [d.token for d in engine.stream({BASE: messages}, GREEDY, max_new_tokens=n, chat_template=template)]


def test_the_models_own_template_is_given_with_its_source(engine, tiny_model):
    assert engine.chat_template == engine.tokenizer.chat_template
    assert "SmolLM" in engine.chat_template
    assert engine.chat_template_source == "the model's tokenizer"
    changed = Engine(ModelSpec(name=str(tiny_model), dtype="float32", chat_template="zephyr"))
    assert changed.chat_template == chat_template("zephyr")
    assert changed.chat_template_source == "the setting model.chat_template"


@pytest.mark.parametrize("template", [EDITED, "chatml", "own"])
def test_it_writes_what_transformers_would(engine, template):
    text = engine.chat_template if template == "own" else template
    tokenizer = load_tokenizer(engine.spec.model_copy(update={"chat_template": text}))
    expected = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    assert engine.prompt(BASE, QUESTION, text) == tokenizer(expected, add_special_tokens=False)["input_ids"]
    changed = Engine(engine.spec.model_copy(update={"chat_template": text}))
    assert answer(engine, text) == answer(changed, None)


def test_its_own_end_of_turn_ends_the_answer(engine, monkeypatch):
    end, own = (engine.tokenizer.convert_tokens_to_ids(token) for token in ("<file_sep>", "<|im_end|>"))
    how = {"max_new_tokens": 4, "seed": 0}
    edited = engine.answer(BASE, QUESTION, GREEDY, **how, chat_template=EDITED)._limits.stop_tokens
    assert end in edited
    assert own in edited  # the model's end of text, whatever the template says
    assert end not in engine.answer(BASE, QUESTION, GREEDY, **how)._limits.stop_tokens
    monkeypatch.setattr(engine, "_forward", lambda columns, **inputs: one_hot(engine, end))
    (delta,) = engine.stream({BASE: QUESTION}, GREEDY, max_new_tokens=4, chat_template=EDITED)
    assert (delta.finished, delta.text) == ("end_of_turn", "")


def one_hot(engine: Engine, token: int):
    import torch

    logits = torch.zeros(1, len(engine.tokenizer))
    logits[0, token] = 1
    return logits


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('only cats') }}", "only cats"),
        ("{% for message in messages %}", "refuses this conversation"),
        ("{{ messages + 1 }}", "refuses this conversation"),
        ("{{ ''.__class__.__mro__ }}", "refuses this conversation"),
        ("{% set ns = namespace(__class__=1) %}{{ ns }}", "refuses this conversation"),
        ("{{ 'x' * (messages | length * 50000000) }}", r"does not come to an end[\s\S]*more than"),
        (SOMETIMES + LOOPS + "{% endif %}", r"come to an end[\s\S]*without end"),
        ("chatlm", r"no such chat template[\s\S]*zephyr"),
        ("", "no such chat template"),
    ],
)  # fmt: skip
def test_a_bad_one_is_told_and_the_engine_lives(engine, template, said):
    began = time.perf_counter()
    with pytest.raises(NbtuneError, match=said):
        engine.stream({BASE: QUESTION}, GREEDY, max_new_tokens=2, chat_template=template)
    assert time.perf_counter() - began < 15
    assert answer(engine, None)


def test_a_bad_one_keeps_nobody_waiting(engine):
    """It is tried before the engine's turn is taken: others write meanwhile."""
    caught = []

    def ask():
        try:
            engine.stream({BASE: QUESTION}, GREEDY, chat_template=LOOPS)
        except NbtuneError as error:
            caught.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert answer(engine, None)
    assert thread.is_alive() or caught
    thread.join()
    assert len(caught) == 1


def test_a_model_whose_own_template_refuses_still_loads(tiny_model):
    spec = ModelSpec(name=str(tiny_model), dtype="float32", chat_template="{{ raise_exception('never') }}")
    engine = Engine(spec)
    with pytest.raises(NbtuneError, match="never"):
        answer(engine, None)
    assert answer(engine, EDITED)
    with pytest.raises(DataError, match="does not come to an end"):
        Engine(spec.model_copy(update={"chat_template": LOOPS}))


def test_texts_are_those_of_each_chat():
    good, bad = written("{{ messages[0].content | tojson }}", [{"messages": QUESTION}, {"messages": []}])
    assert good == '"Be brief."'
    assert isinstance(bad, DataError)
    assert "no element 0" in bad.message
