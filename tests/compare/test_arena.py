from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from gradio_client import Client

from nbtune.compare.arena import arena
from nbtune.errors import NbtuneError

SHOTS = Path(os.environ.get("NBTUNE_SHOTS", "/tmp/shots"))
COLUMNS = ("base", "amber-heron", "quiet.otter")
GREEDY = (0, 1, 0, 0, 1)
QUESTION = "What does `os.path.join` do in Python?"


@pytest.fixture(scope="module")
def page(runs_dir):
    with arena("amber-heron", "quiet.otter", runs_dir=runs_dir) as opened:
        yield opened


@pytest.fixture
def client(page):
    return Client(page.url, verbose=False)


def compare(client, question=QUESTION, length=6, knobs=GREEDY, system=""):
    """The last view: notice, heads, chats. Gradio's client leaves buttons and states out."""
    _, notice, _, *columns = client.predict(question, system, length, 0, *knobs, api_name="/compare")
    return notice, columns[: len(COLUMNS)], columns[len(COLUMNS) :]


def said(chat):
    """Texts of a chatbot's value, whose content is a list of blocks."""
    return ["".join(block["text"] for block in message["content"]) for message in chat]


def test_all_columns_answer_with_their_speed(page, client):
    assert page.columns == COLUMNS
    _, heads, chats = compare(client)
    for name, head, chat in zip(COLUMNS, heads, chats, strict=True):
        question, answer = said(chat)
        assert question == QUESTION
        assert answer.strip()
        assert name in head
        assert "to first token" in head
        assert "tokens/s" in head
        assert "cut at the limit" in head


def test_answers_are_those_of_the_engine(page, client):
    from nbtune.infer.sampling import GREEDY as greedy

    expected = dict.fromkeys(COLUMNS, "")
    question = [{"role": "user", "content": QUESTION}]
    for delta in page.engine.stream(dict.fromkeys(COLUMNS, question), greedy, max_new_tokens=6):
        expected[delta.column] += delta.text
    _, _, chats = compare(client)
    assert {name: said(chat)[1].strip() for name, chat in zip(COLUMNS, chats, strict=True)} == {
        name: text.strip() for name, text in expected.items()
    }


def test_each_visitor_has_a_conversation_that_grows_and_can_be_cleared(page, client):
    compare(client, length=2)
    _, _, chats = compare(client, "And in one word?", length=2)
    assert all(len(chat) == 4 for chat in chats)
    _, _, other = compare(Client(page.url, verbose=False), length=2)
    assert all(len(chat) == 2 for chat in other)
    client.predict(api_name="/clear")
    _, _, chats = compare(client, length=2)
    assert all(len(chat) == 2 for chat in chats)


@pytest.mark.parametrize(
    ("question", "expected"), [("  ", "There is no question"), ("word " * 9000, "longer than the model")]
)
def test_a_mistake_is_said_on_the_page_and_loses_nothing(client, question, expected):
    notice, _, _ = compare(client, question)
    assert expected in str(notice)
    assert compare(client, length=1)[2]


def test_stop_ends_the_answer(client):
    job = client.submit(QUESTION, "", 400, 0, *GREEDY, api_name="/compare")
    while not job.outputs():
        time.sleep(0.05)
    client.predict(api_name="/stop")
    last = job.result(timeout=20)
    assert "stopped" in str(last)


def test_a_visitor_who_leaves_frees_the_model(page):
    leaving = Client(page.url, verbose=False)
    job = leaving.submit(QUESTION, "", 400, 0, *GREEDY, api_name="/compare")
    while not job.outputs():
        time.sleep(0.05)
    job.cancel()
    start = time.monotonic()
    compare(Client(page.url, verbose=False), length=1)
    assert time.monotonic() - start < 20


def test_files_of_this_machine_cannot_be_read(page):
    for path in (Path(__file__).resolve(), Path("/etc/hostname"), Path("pyproject.toml").resolve()):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{page.url}/gradio_api/file={path}")
        assert caught.value.code in (403, 404)


def test_it_is_not_shared_and_only_on_this_machine(page):
    assert page.url.startswith("http://127.0.0.1:")
    blocks = page._page.blocks
    assert blocks.share is False
    assert blocks.share_url is None
    assert blocks.analytics_enabled is False


@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "width", "height"), [("light", 1400, 900), ("dark", 900, 800)])
def test_in_a_browser(page, chromium, scheme, width, height):
    tab = chromium.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    foreign = []
    tab.on("request", lambda request: foreign.append(request.url) if page.url not in request.url else None)
    tab.goto(page.url)
    tab.get_by_placeholder("Ask 3 columns at once").fill(QUESTION)
    tab.get_by_role("button", name="Send").click()
    spoken = "[...document.querySelectorAll('.nb-stats')].filter(e => e.innerText.includes('tokens/s')).length === 3"
    tab.wait_for_function(f"() => {spoken}", timeout=60_000)
    tab.get_by_role("button", name="Stop").click()
    tab.wait_for_function("() => document.querySelectorAll('.nb-stats em').length === 3", timeout=60_000)
    answers = tab.locator("[data-testid=bot]").all_inner_texts()
    assert len(answers) == 3
    assert all(answer.strip() for answer in answers)
    assert all("tokens/s" in text for text in tab.locator(".nb-stats").all_inner_texts())
    tab.wait_for_function("() => !document.querySelector('#nb-send').disabled", timeout=10_000)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert [url for url in foreign if not url.startswith(("data:", "blob:"))] == []
    SHOTS.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=SHOTS / f"arena-test-{scheme}-{width}.png")
    tab.close()


def test_a_taken_port_is_a_clear_error(page, runs_dir, monkeypatch):
    monkeypatch.setattr("nbtune.compare.arena._open", None)
    with pytest.raises(NbtuneError, match="port is taken"):
        arena(runs_dir=runs_dir, port=int(page.url.rpartition(":")[2]))


def test_a_new_arena_closes_the_one_before_and_wait_returns(adapters):
    first = arena(launch=False)
    assert first.url is None
    waiting = threading.Thread(target=first.wait)
    waiting.start()
    second = arena(launch=False)
    waiting.join(5)
    assert not waiting.is_alive()
    second.close()
    second.close()


def test_gradio_and_torch_are_imported_only_with_the_arena():
    modules = "nbtune.infer.columns, nbtune.infer.sampling, nbtune.compare.chat"
    code = f"import sys, {modules}; print([name for name in ('gradio', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == []
