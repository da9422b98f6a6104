"""The endpoint by OpenAI's own client, over a real socket: the answers are those of the engine alone."""

import json
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest

from nbtune.errors import NbtuneError
from nbtune.infer import batch
from nbtune.infer.engine import BASE, Engine
from nbtune.infer.sampling import GREEDY
from nbtune.infer.server import LARGEST_BODY, Server, serve
from nbtune.spec import ModelSpec

SPEC = ModelSpec(name="smollm2-135m-instruct", dtype="float32")
QUESTIONS = ["What does `os.path.join` do?", "Name three colours.", "Hi", "Count from one to ten, in words, please."]


def asked(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def server(adapters):
    with Server(Engine(SPEC, adapters), "127.0.0.1", 0, None) as server:
        yield server


@pytest.fixture(scope="module")
def expected(engine):
    """What each column writes alone, greedily."""
    found = {}
    for column in engine.columns:
        for text in QUESTIONS:
            deltas = engine.stream({column: asked(text)}, GREEDY, max_new_tokens=10)
            found[column, text] = "".join(delta.text for delta in deltas)
    assert len(set(found.values())) > 6
    return found


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="unused", max_retries=0) as client:
        yield client


def complete(client, column, text, **more):
    settings = {"temperature": 0, "top_p": 1, "max_tokens": 10} | more
    return client.chat.completions.create(model=column, messages=asked(text), **settings)


def test_the_columns_are_the_models(client, engine):
    assert [model.id for model in client.models.list()] == list(engine.columns)


def test_a_whole_answer_is_the_engines(client, engine, expected):
    for column in engine.columns:
        done = complete(client, column, QUESTIONS[0])
        assert done.choices[0].message.content == expected[column, QUESTIONS[0]]
        assert done.choices[0].finish_reason == "length"
        assert done.usage.completion_tokens == 10
        assert done.usage.prompt_tokens == len(engine.prompt(column, asked(QUESTIONS[0])))
        assert done.model == column


def test_a_streamed_answer_is_the_same(client, expected):
    events = list(complete(client, BASE, QUESTIONS[0], stream=True, stream_options={"include_usage": True}))
    choices = [event.choices[0] for event in events if event.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == expected[BASE, QUESTIONS[0]]
    assert len([choice for choice in choices if choice.delta.content]) > 5
    assert [choice.finish_reason for choice in choices][-1] == "length"
    assert events[-1].usage.completion_tokens == 10


def test_eight_requests_with_other_adapters_at_once(client, server, engine, expected, monkeypatch):
    monkeypatch.setattr(batch, "PIECE", 16)  # so that all prompts are read in pieces
    rows = []
    forward = server.engine._forward

    def counted(columns, **inputs):
        rows.append(len(columns))
        return forward(columns, **inputs)

    server.engine._forward = counted
    asks = [(column, text) for text in QUESTIONS for column in engine.columns][:8]
    found = {}

    def ask(column, text, stream):
        done = complete(client, column, text, stream=stream)
        if stream:
            found[column, text] = "".join(event.choices[0].delta.content or "" for event in done)
        else:
            found[column, text] = done.choices[0].message.content

    threads = [threading.Thread(target=ask, args=(*pair, number % 2 == 0)) for number, pair in enumerate(asks)]
    for thread in threads:
        thread.start()
        time.sleep(0.03)  # so that they join a batch that is under way
    for thread in threads:
        thread.join()
    server.engine._forward = forward
    assert found == {pair: expected[pair] for pair in asks}
    assert max(rows) > 3
    assert len(rows) < 80  # one after the other takes more than 100


def test_a_stop_text_ends_the_answer_before_it(client, expected):
    whole = expected[BASE, QUESTIONS[0]]
    stop = whole[8:14]
    done = complete(client, BASE, QUESTIONS[0], stop=["never said", stop])
    assert done.choices[0].message.content == whole[:8]
    assert done.choices[0].finish_reason == "stop"
    events = complete(client, BASE, QUESTIONS[0], stop=stop, stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in events) == whole[:8]


def test_a_seed_means_a_text(client):
    first, again, other = (
        complete(client, BASE, "Tell me a story.", temperature=1.5, seed=seed).choices[0].message.content
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_who_goes_away_gives_the_row_back(client, server, expected):
    events = complete(client, BASE, QUESTIONS[0], max_tokens=4000, stream=True)
    next(iter(events))
    events.close()
    deadline = time.monotonic() + 30
    while server._scheduler._batches and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server._scheduler._batches == []
    assert complete(client, BASE, QUESTIONS[2]).choices[0].message.content == expected[BASE, QUESTIONS[2]]


def test_a_failure_of_one_answer_leaves_the_server_alive(client, server, monkeypatch, expected):
    with monkeypatch.context() as patch:
        patch.setattr(server.engine, "_forward", lambda *_, **__: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
            complete(client, BASE, "Hi")
        with pytest.raises(openai.APIError, match="ZeroDivisionError"):
            list(complete(client, BASE, "Hi", stream=True))
    assert complete(client, BASE, "Hi").choices[0].message.content == expected[BASE, "Hi"]


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"model": "nobody"}, 404, "there are: base, amber-heron"),
        ({"temperature": 9}, 400, "temperature"),
        ({"messages": []}, 400, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "'text'",
        ),
        ({"n": 2}, 400, "n: "),
        ({"extra_body": {"logit_bias": {"1": 5}}}, 400, "logit_bias"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"messages": asked("word " * 9000)}, 400, "longer than the model's context"),
        ({"messages": asked("word " * 9000), "stream": True}, 400, "longer than the model's context"),
        ({"messages": asked("x" * (LARGEST_BODY + 1))}, 413, "larger than"),
    ],
)
def test_what_cannot_be_answered_is_told(client, changes, status, message):
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**{"model": BASE, "messages": asked("Hi")} | changes)
    assert caught.value.status_code == status
    assert message in caught.value.message


def post(server, headers, body=b"{}"):
    request = urllib.request.Request(f"{server.url}/chat/completions", body, headers)
    try:
        return urllib.request.urlopen(request).status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_page_of_another_name_does_not_reach_it(server):
    assert post(server, {"Host": "evil.example"}) == 400
    body = json.dumps({"model": BASE, "messages": asked("Hi"), "max_tokens": 1}).encode()
    assert post(server, {"Host": "localhost:1"}, body) == 200
    assert post(server, {}, b"{") == 400


def test_a_key_is_asked_for_where_there_is_one(tiny_model, monkeypatch):
    with Server(Engine(ModelSpec(name=str(tiny_model), dtype="float32")), "127.0.0.1", 0, "the key") as server:
        for key, status in (("", 401), ("wrong", 401), ("the key", 400)):
            assert post(server, {"Authorization": f"Bearer {key}"}) == status


def test_elsewhere_than_here_a_key_is_made(runs_dir, monkeypatch):
    made = []
    monkeypatch.setattr("nbtune.infer.server.Server", lambda *arguments: made.append(arguments))
    serve("base", "amber-heron", runs_dir=runs_dir, host="0.0.0.0", port=0)
    serve("base", "amber-heron", runs_dir=runs_dir, port=0)
    (_, host, _, key), (engine, _, _, none) = made
    assert host == "0.0.0.0"
    assert len(key) > 20
    assert none is None
    assert engine.columns == (BASE, "amber-heron")


def test_a_taken_port_is_told(server, tiny_model):
    with pytest.raises(NbtuneError, match="cannot be used"):
        Server(
            Engine(ModelSpec(name=str(tiny_model), dtype="float32")),
            "127.0.0.1",
            int(server.url.split(":")[2][:-3]),
            None,
        )
