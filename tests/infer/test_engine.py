from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from nbtune.errors import AdapterError, NbtuneError
from nbtune.infer import batch
from nbtune.infer.engine import BASE, Engine
from nbtune.infer.sampling import GREEDY, Sampling
from nbtune.models import load
from nbtune.peft import PeftModel
from nbtune.spec import ModelSpec

SPEC = ModelSpec(name="smollm2-135m-instruct", dtype="float32")
QUESTION = [{"role": "user", "content": "What does `os.path.join` do in Python?"}]
OTHER = [*QUESTION, {"role": "assistant", "content": "It joins paths."}, {"role": "user", "content": "Show me how."}]
WARM = Sampling(temperature=1.5, top_p=0.95, top_k=50, min_p=0.01, repetition_penalty=1.1)


def answer(engine, columns, sampling=GREEDY, messages=QUESTION, n=8, **more):
    """Tokens of each column."""
    tokens = {column: [] for column in columns}
    for delta in engine.stream(dict.fromkeys(columns, messages), sampling, max_new_tokens=n, **more):
        if delta.token is not None:
            tokens[delta.column].append(delta.token)
    return tokens


def texts(engine, columns, **more):
    found = dict.fromkeys(columns, "")
    for delta in engine.stream(dict.fromkeys(columns, QUESTION), GREEDY, max_new_tokens=8, **more):
        found[delta.column] += delta.text
    return found


@pytest.mark.parametrize("messages", [QUESTION, OTHER], ids=["one turn", "three turns"])
def test_greedy_equals_transformers_generate(engine, adapters, messages):
    loaded = load(SPEC)
    inputs = loaded.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )

    def generate(model):
        out = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        return out[0, inputs["input_ids"].shape[1] :].tolist()

    expected = {BASE: generate(loaded.model)}
    for name, folder in adapters.items():
        adapted = PeftModel.from_pretrained(loaded.model, folder)
        expected[name] = generate(adapted)
        adapted.unload()
    assert len({tuple(tokens) for tokens in expected.values()}) > 1  # or the adapters change nothing
    assert answer(engine, engine.columns, messages=messages) == expected


def test_greedy_with_a_repetition_penalty_equals_generate(engine):
    loaded = load(SPEC)
    inputs = loaded.tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=8, repetition_penalty=1.3)
    sampling = Sampling(temperature=0, repetition_penalty=1.3)
    assert answer(engine, [BASE], sampling)[BASE] == out[0, inputs["input_ids"].shape[1] :].tolist()


def test_a_column_answers_the_same_in_any_company(engine):
    together = answer(engine, engine.columns, WARM, seed=7)
    for column in engine.columns:
        assert answer(engine, [column], WARM, seed=7) == {column: together[column]}
    reordered = answer(engine, tuple(reversed(engine.columns)), WARM, seed=7)
    assert reordered == together


def test_a_seed_means_a_text(engine):
    first, again, other = (answer(engine, [BASE], WARM, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_text_is_the_decoded_tokens_and_stats_count_them(engine):
    tokens, text, last = [], "", None
    for delta in engine.stream({BASE: QUESTION}, GREEDY, max_new_tokens=8):
        tokens.append(delta.token)
        text += delta.text
        assert last is None or last.finished is None
        last = delta
    assert text == engine.tokenizer.decode(tokens, skip_special_tokens=True)
    assert last.finished == "max_new_tokens"
    assert last.stats.tokens == 8
    assert last.stats.prompt_tokens == len(engine.prompt(BASE, QUESTION))
    assert 0 < last.stats.first_token_seconds < last.stats.seconds
    assert last.stats.tokens_per_second == pytest.approx(7 / (last.stats.seconds - last.stats.first_token_seconds))


def test_the_end_of_turn_ends_an_answer_and_is_not_shown(engine):
    question = [{"role": "user", "content": "Answer with one word only: what is the capital of France?"}]
    deltas = list(engine.stream({BASE: question}, GREEDY, max_new_tokens=60))
    assert deltas[-1].finished == "end_of_turn"
    assert engine.tokenizer.decode([deltas[-1].token]) == "<|im_end|>"
    text = "".join(delta.text for delta in deltas)
    assert text
    assert "<|" not in text


def test_stop_ends_within_one_token(engine):
    stop = threading.Event()
    seen = []
    for delta in engine.stream(dict.fromkeys(engine.columns, QUESTION), GREEDY, should_stop=stop.is_set):
        seen.append(delta)
        if len(seen) == 4:
            stop.set()
    assert len(seen) == 4 + len(engine.columns)
    assert {delta.column for delta in seen[4:]} == set(engine.columns)
    assert all(delta.finished == "stopped" for delta in seen[4:])


def test_prompts_read_in_pieces_are_read_right(engine, monkeypatch):
    asked = {BASE: OTHER, engine.columns[1]: QUESTION}  # of other lengths
    whole = [delta.token for delta in engine.stream(asked, GREEDY, max_new_tokens=8)]
    monkeypatch.setattr(batch, "PIECE", 7)
    lengths = []
    forward = engine._forward
    monkeypatch.setattr(engine, "_forward", lambda *args, **inputs: (
        lengths.append(inputs["input_ids"].shape[1]), forward(*args, **inputs))[1])  # fmt: skip
    pieces = list(engine.stream(asked, GREEDY, max_new_tokens=8))
    assert [delta.token for delta in pieces] == whole
    longest = len(engine.prompt(BASE, OTHER))
    assert lengths == [7] * (longest // 7) + [longest % 7] + [1] * 7
    assert pieces[0].stats.first_token_seconds > pieces[2].stats.seconds - pieces[0].stats.seconds  # all of the pieces


def test_stop_is_heard_between_two_pieces_of_a_prompt(engine, monkeypatch):
    monkeypatch.setattr(batch, "PIECE", 7)
    read = []
    forward = engine._forward
    monkeypatch.setattr(engine, "_forward", lambda *args, **inputs: (read.append(1), forward(*args, **inputs))[1])
    deltas = list(engine.stream({BASE: OTHER}, GREEDY, should_stop=lambda: len(read) == 2))
    assert [(delta.finished, delta.token) for delta in deltas] == [("stopped", None)]
    assert len(read) == 2


def test_one_stream_at_a_time_and_a_closed_one_lets_the_next_in(engine):
    first = engine.stream({BASE: QUESTION}, GREEDY)
    next(first)
    done = threading.Event()

    def wait():
        answer(engine, ["amber-heron"], n=2)
        done.set()

    second = threading.Thread(target=wait)
    second.start()
    assert not done.wait(0.7)
    first.close()  # what Gradio does when the browser goes away
    assert done.wait(60)
    second.join()


def test_waiting_for_another_stream_can_be_stopped(engine):
    first = engine.stream({BASE: QUESTION}, GREEDY)
    next(first)
    deltas = list(engine.stream({BASE: QUESTION}, GREEDY, should_stop=lambda: True))
    assert [delta.finished for delta in deltas] == ["stopped"]
    first.close()


def test_a_failure_in_the_model_lets_the_next_stream_in(engine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(engine.stream({BASE: QUESTION}))
    assert answer(engine, [BASE], n=1)


def test_a_conversation_longer_than_the_context_is_refused_at_once(engine):
    long = [{"role": "user", "content": "word " * engine.context_length}]
    with pytest.raises(NbtuneError, match=r"longer than the model's context[\s\S]*8,192"):
        engine.stream({BASE: long})


def test_an_answer_ends_where_the_context_does(engine, monkeypatch):
    monkeypatch.setattr(engine.base_of(BASE), "context_length", len(engine.prompt(BASE, QUESTION)) + 3)
    deltas = list(engine.stream({BASE: QUESTION}, GREEDY))
    assert len(deltas) == 3
    assert deltas[-1].finished == "context"


def test_an_unknown_column_is_refused_with_the_known_ones(engine):
    with pytest.raises(NbtuneError, match="amber-heron"):
        engine.stream({"amber": QUESTION})


def test_no_tokens_are_refused(engine):
    with pytest.raises(NbtuneError, match="max_new_tokens is 0"):
        engine.stream({BASE: QUESTION}, max_new_tokens=0)


def test_an_adapter_of_another_base_is_refused(adapters, tiny_model: Path):
    with pytest.raises(AdapterError) as caught:
        Engine(ModelSpec(name=str(tiny_model), dtype="float32"), {"amber-heron": adapters["amber-heron"]})
    assert any("amber-heron" in note for note in caught.value.__notes__)


def test_the_base_alone_and_a_whole_model_beside_it(tiny_model: Path, tmp_path: Path):
    spec = ModelSpec(name=str(tiny_model), dtype="float32")
    loaded = load(spec)
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(-1)
    loaded.model.save_pretrained(tmp_path / "tuned")
    loaded.tokenizer.save_pretrained(tmp_path / "tuned")
    alone = answer(Engine(spec), [BASE])
    both = answer(Engine(spec, models={"tuned": tmp_path / "tuned"}), [BASE, "tuned"])
    assert both[BASE] == alone[BASE]
    assert both["tuned"] != both[BASE]
    assert answer(Engine(ModelSpec(name=str(tmp_path / "tuned"), dtype="float32")), [BASE])[BASE] == both["tuned"]


def test_two_columns_of_one_name_are_refused():
    with pytest.raises(NbtuneError, match="same name"):
        Engine(SPEC, {BASE: "somewhere"})


def test_bfloat16(adapters):
    engine = Engine(SPEC.model_copy(update={"dtype": "bfloat16"}), adapters)
    assert engine.dtype is torch.bfloat16
    assert all(texts(engine, engine.columns).values())
    engine.close()
