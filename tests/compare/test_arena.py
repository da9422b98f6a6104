"""The arena by Gradio's own client and in a real browser, over the real 135M model."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from gradio_client import Client, handle_file

from nbtune.compare.arena import arena
from nbtune.compare.votes import Ballots
from nbtune.errors import NbtuneError
from nbtune.infer.attachments import MAX_BYTES, fit, read
from nbtune.infer.mix import Mix
from nbtune.infer.router import ByRule
from nbtune.infer.sampling import GREEDY

SHOTS = Path(os.environ.get("NBTUNE_SHOTS", "/tmp/shots"))
COLUMNS = ("base", "amber-heron", "quiet.otter")
SPREAD = (1.0, 1.0, 0, 0.0, 1.0)  # temperature 1
GREEDILY = (0.0, 1.0, 0, 0.0, 1.0)
QUESTION = "What does `os.path.join` do in Python?"


@dataclasses.dataclass
class Seen:
    """What the page shows."""

    standings: str
    heads: list[str]
    chats: list[list[str]]  # the texts of each column, in the order shown
    notice: str

    @property
    def answers(self):
        return [chat[-1] for chat in self.chats]


class Visitor:
    """Somebody who has the page open."""

    def __init__(self, page):
        self.client = Client(page.url, verbose=False)
        self.template = page.engine.chat_template
        self.places = len(COLUMNS) + 2  # with the mix's and the router's

    def settings(self, length=6, system="", seed=0, budget=1024, template=None, knobs=GREEDILY):
        return (system, length, seed, budget, template or self.template, *knobs)

    def mix(self, shown=False, kind="cat", weights=(0.5, 0.5)):
        return (shown, kind, 0.5, "total", *weights)

    def ask(self, question=QUESTION, files=(), mix=None, **settings):
        typed = {"text": question, "files": [handle_file(str(file)) for file in files]}
        inputs = (typed, *self.settings(**settings), *(mix or self.mix()))
        return self.seen(self.client.predict(*inputs, api_name="/compare"))

    def submit(self, length):
        inputs = ({"text": QUESTION, "files": []}, *self.settings(length), *self.mix())
        return self.client.submit(*inputs, api_name="/compare")

    def regenerate(self, **settings):
        return self.seen(self.client.predict(*self.settings(**settings), *self.mix(), api_name="/regenerate"))

    def vote(self, how):
        return self.seen(self.client.predict(*self.settings(), api_name=f"/vote_{how}"))

    def call(self, name, *values):
        return self.seen(self.client.predict(*values, api_name=f"/{name}"))

    def seen(self, values):
        """What an answer of the API holds; what has not changed comes as a dict without value."""
        standings, *rest = [
            value.get("value") if isinstance(value, dict) and "__type__" in value else value for value in values
        ]
        heads, chats = rest[: self.places], rest[self.places : 2 * self.places]
        texts = [
            ["".join(block["text"] for block in message["content"]).strip() for message in chat]
            for chat in chats
            if chat
        ]
        return Seen(standings, heads[: len(texts)], texts, rest[2 * self.places])


@pytest.fixture(scope="module")
def page(runs_dir):
    with arena(
        "amber-heron",
        "quiet.otter",
        runs_dir=runs_dir,
        router=ByRule(lambda text: COLUMNS["join" in text], COLUMNS[1:]),
    ) as opened:
        yield opened


@pytest.fixture
def visitor(page):
    return Visitor(page)


def alone(page, column, messages, tokens=6):
    """What the engine says."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    deltas = page.engine.stream({column: messages}, GREEDY, max_new_tokens=tokens)
    return "".join(delta.text for delta in deltas).strip()  # Gradio strips too


def test_all_columns_answer_as_the_engine_does_and_tell_their_speed(page, visitor):
    assert page.columns == COLUMNS
    seen = visitor.ask()
    for name, head, chat in zip(COLUMNS, seen.heads, seen.chats, strict=True):
        assert chat == [QUESTION, alone(page, name, QUESTION)]
        assert name in head
        assert "to first token" in head
        assert "tokens/s" in head
        assert "cut at the limit" in head


def test_each_visitor_has_a_conversation_that_grows_and_can_be_cleared(page, visitor):
    visitor.ask(length=2)
    seen = visitor.ask("And in one word?", length=2)
    assert all(len(chat) == 4 for chat in seen.chats)
    assert all(len(chat) == 2 for chat in Visitor(page).ask(length=2).chats)
    assert visitor.call("clear").chats == []
    assert all(len(chat) == 2 for chat in visitor.ask(length=2).chats)


def test_what_came_before_is_read(page, visitor):
    first = visitor.ask("My name is Ada.")
    seen = visitor.ask("What is my name?", system="Answer in one word.")
    messages = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": first.answers[0]},
        {"role": "user", "content": "What is my name?"},
    ]
    assert seen.answers[0] == alone(page, "base", messages)


def test_regenerating_answers_the_same_question_with_another_seed(visitor):
    first = visitor.ask(length=12, knobs=SPREAD, seed=7)
    again = visitor.regenerate(length=12, knobs=SPREAD, seed=7)
    assert all(len(chat) == 2 for chat in again.chats)
    assert again.answers != first.answers
    assert visitor.call("clear").chats == []
    assert visitor.ask(length=12, knobs=SPREAD, seed=8).answers == again.answers


def test_a_template_can_be_edited_for_one_page(page, visitor):
    plain = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    seen = visitor.ask(template=plain)
    assert seen.answers[0] != alone(page, "base", QUESTION)
    assert Visitor(page).ask().answers[0] == alone(page, "base", QUESTION)


def test_three_files_are_read_within_the_budget_that_is_told(page, visitor, tmp_path):
    files = {
        "notes.md": "# Notes\n\nThe heron is amber.\n",
        "data.csv": "name,age\nAda,36\n",
        "code.py": "x = 1\n" * 400,
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    seen = visitor.ask("Who is 36?", [tmp_path / name for name in files], budget=256)
    told, question, answer = seen.chats[0]
    assert "notes.md: 11 tokens" in told
    assert re.search(r"code\.py: [\d,]+ of [\d,]+ tokens, cut after line \d+ of 400", told)
    context = fit(read(list(files), inside=tmp_path), 256, page.engine.tokenizer)
    assert context.tokens <= 256
    assert question == "Who is 36?"
    assert answer == alone(page, "base", context.prompt("Who is 36?"))


def encrypted_pdf(folder):
    from pypdf import PdfWriter

    writer = PdfWriter()
    writer.add_blank_page(100, 100)
    writer.encrypt("secret")
    writer.write(folder / "secret.pdf")
    return folder / "secret.pdf"


def test_mistakes_are_said_on_the_page_and_lose_nothing(page, visitor, tmp_path):
    before = visitor.ask(length=2)
    mistakes = {
        "There is no question": {"question": "  "},
        "longer than the model": {"question": "word " * 100_000},
        "chat template": {"template": "{{ raise_exception('never') }}"},
        "password": {"files": [encrypted_pdf(tmp_path)]},
    }
    for expected, asked in mistakes.items():
        assert expected in visitor.ask(**asked).notice
    after = visitor.ask("Go on.", length=2)
    assert [chat[:2] for chat in after.chats] == before.chats


def test_a_file_that_is_too_large_is_refused_while_it_comes(page, visitor):
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="big.txt"\r\n\r\n'
    body = head + b"a" * (MAX_BYTES + 1_000_000) + b"\r\n--b--\r\n"
    request = urllib.request.Request(f"{page.url}/gradio_api/upload", body)
    request.add_header("Content-Type", "multipart/form-data; boundary=b")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 413
    assert visitor.ask(length=1).answers


def test_names_are_hidden_until_a_vote_which_changes_the_ranking(page, visitor, runs_dir):
    ballots = Ballots(runs_dir / "votes.jsonl")
    before = len(ballots.votes())
    visitor.call("blind")
    seen = visitor.ask()
    shown = " ".join(seen.heads)
    assert [name for name in (*COLUMNS, "LoRA", "as it was") if name in shown] == []
    assert [word in head for word, head in zip(("Left", "Middle", "Right"), seen.heads, strict=True)] == [True] * 3
    expected = {alone(page, name, QUESTION): name for name in COLUMNS}
    order = [expected[answer] for answer in seen.answers]
    assert sorted(order) == sorted(COLUMNS)

    voted = visitor.vote(2)
    assert f"Middle was <b>{order[1]}</b>" in voted.notice
    assert [name in head for name, head in zip(order, voted.heads, strict=True)] == [True] * 3
    assert re.search(rf"<b>{before + 1} votes?</b><span>{re.escape(order[1])} 0\.", voted.standings)
    vote = ballots.votes()[-1]
    assert (vote.columns, vote.best, vote.blind) == (tuple(order), (order[1],), True)
    assert vote.question == QUESTION
    assert "does not count" in visitor.vote(1).notice
    assert len(ballots.votes()) == before + 1

    seen = visitor.ask("Hello")  # a new round
    assert all(len(chat) == 2 for chat in seen.chats)
    assert "Left" in seen.heads[0]
    for how in ("tie", "all_bad"):
        visitor.vote(how)
        visitor.ask("Hello", length=1)
    assert [len(vote.best) for vote in ballots.votes()[-2:]] == [3, 0]


def test_votes_are_in_mlflow(page, runs_dir):
    from mlflow import MlflowClient

    deadline = time.monotonic() + 60
    client = MlflowClient(f"sqlite:///{(runs_dir / 'mlflow.db').resolve()}")
    while True:
        runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
        metrics = runs[0].data.metrics if runs else {}
        if metrics.get("votes") == 3 or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert metrics["votes"] == 3
    assert sum("amber-heron" in name for name in metrics) >= 3


def test_adapters_are_mixed_in_a_column_and_saved(page, visitor, runs_dir):
    visitor.call("show_mix", True, False)
    seen = visitor.ask(mix=visitor.mix(True, "cat", (1.0, -0.5)))
    assert "1 amber-heron + -0.5 quiet.otter, cat" in seen.heads[3]
    column = page.engine.mix(Mix({"amber-heron": 1.0, "quiet.otter": -0.5}, "cat", density=0.5))
    assert seen.answers[3] == alone(page, column, QUESTION)
    other = visitor.mix(True, "cat", (0.1, 0.0))
    assert visitor.client.predict("half", *other, api_name="/save_mix").count("mixes/half")
    assert json.loads((runs_dir / "mixes" / "half" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert "exists" in visitor.client.predict("half", *other, api_name="/save_mix")
    assert "needs a name" in visitor.client.predict("../half", *other, api_name="/save_mix")
    assert "linear needs" in visitor.ask(mix=visitor.mix(True, "linear", (1, 1))).notice  # ranks 4 and 8


def test_a_router_answers_in_a_column_and_says_why(page, visitor):
    visitor.call("show_router", False, True)
    job = visitor.submit(6)
    seen = visitor.seen(job.result())
    first, second, *_ = [visitor.seen(output).notice for output in job.outputs()]
    assert "The router is made" in first
    assert second == ""
    assert seen.answers[3] == seen.answers[1]
    assert "amber-heron 1.00: the rule says amber-heron" in seen.heads[3]
    assert "base" in visitor.ask("Hello").heads[3]


def test_two_visitors_at_once_do_not_meet(page):
    weights = {(1.0, 0.0): "one", (0.0, 1.0): "two"}
    found = {}

    def visit(given, word):
        visitor = Visitor(page)
        visitor.call("show_mix", True, False)
        found[word] = visitor.ask(f"Say {word}.", mix=visitor.mix(True, "cat", given))

    threads = [threading.Thread(target=visit, args=pair) for pair in weights.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for column, word in zip(("amber-heron", "quiet.otter"), ("one", "two"), strict=True):
        assert [chat[0] for chat in found[word].chats] == [f"Say {word}."] * 4
        assert found[word].answers[3] == alone(page, column, f"Say {word}.")


def test_a_prompt_set_goes_through_all_columns(page, visitor, tmp_path):
    rows = [{"instruction": f"Name {count} colours.", "output": "red, blue"} for count in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    progress, told, table, files = visitor.client.predict(
        "", handle_file(str(tmp_path / "rows.jsonl")), None, 2, 3, api_name="/prompt_set"
    )
    assert "6 of 6 answers" in progress
    measures, answers = told["value"], table["value"]
    assert all(name in measures for name in (*COLUMNS, "perplexity", "ROUGE-L"))
    assert answers["headers"] == ["row", "prompt", "reference", *COLUMNS]
    assert [row[1] for row in answers["data"]] == ["Name 0 colours.", "Name 1 colours."]
    assert answers["data"][0][3].strip() == alone(page, "base", "Name 0 colours.", 3).strip()
    assert sorted(Path(file).suffix for file in files["value"]) == [".csv", ".json", ".jsonl", ".md"]
    _, told, _, _ = visitor.client.predict("a\nb", None, "stdlib-docs (amber-heron)", 2, 3, api_name="/prompt_set")
    assert "Choose one set of prompts" in told["value"]


def wait_for_first(job):
    while not job.outputs():
        assert not job.done(), job.exception()
        time.sleep(0.05)


def test_stop_ends_the_answer(visitor):
    job = visitor.submit(400)
    wait_for_first(job)
    visitor.client.predict(api_name="/stop")
    assert "stopped" in str(job.result(timeout=60))


def test_a_visitor_who_leaves_frees_the_model(page):
    job = Visitor(page).submit(400)
    wait_for_first(job)
    job.cancel()
    start = time.monotonic()
    Visitor(page).ask(length=1)
    assert time.monotonic() - start < 60


def test_files_of_this_machine_cannot_be_read(page, visitor):
    for path in (Path(__file__).resolve(), Path("/etc/hostname"), Path("pyproject.toml").resolve()):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{page.url}/gradio_api/file={path}")
        assert caught.value.code in (403, 404)
    planted = {"path": "/etc/hostname", "orig_name": "hostname", "meta": {"_type": "gradio.FileData"}}
    typed = {"text": "What is in it?", "files": [planted]}
    body = json.dumps({"data": [typed, *visitor.settings(), *visitor.mix()]}).encode()
    request = urllib.request.Request(f"{page.url}/gradio_api/call/compare", body, {"Content-Type": "application/json"})
    event = json.load(urllib.request.urlopen(request))["event_id"]
    said = urllib.request.urlopen(f"{page.url}/gradio_api/call/compare/{event}").read().decode()
    assert said.startswith("event: error")
    assert Path("/etc/hostname").read_text().strip() not in said


def test_it_is_not_shared_and_only_on_this_machine(page):
    assert page.url.startswith("http://127.0.0.1:")
    blocks = page._page.blocks
    assert blocks.share is False
    assert blocks.share_url is None
    assert blocks.allowed_paths == []
    assert blocks.analytics_enabled is False


def test_a_shared_page_needs_a_password():
    with pytest.raises(NbtuneError, match="needs a password"):
        arena(share=True)


@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "width", "height"), [("light", 1400, 1000), ("dark", 900, 900)])
def test_in_a_browser(page, chromium, tmp_path, scheme, width, height):
    """Two adapters and the base answer at once, three files are used, a question is edited, a blind vote counts."""
    tab = chromium.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    tab.set_default_timeout(90_000)
    foreign = []
    tab.on("request", lambda request: foreign.append(request.url) if page.url not in request.url else None)
    SHOTS.mkdir(parents=True, exist_ok=True)

    def shot(name):
        tab.screenshot(path=SHOTS / f"arena-{name}-{scheme}-{width}.png")

    def answered():
        """Stop, and wait until every column has said so."""
        speaking = "[...document.querySelectorAll('.nb-stats')].filter(e => e.innerText.includes('tokens/s')).length"
        tab.wait_for_function(f"() => {speaking} === 3")
        tab.evaluate("document.querySelector('#nb-stop').click()")  # which does nothing where all have ended
        tab.wait_for_function(
            "() => !document.querySelector('.nb-live') && !document.querySelector('#nb-send').disabled"
        )
        return tab.locator("[data-testid=bot]").all_inner_texts()

    for name in ("a.md", "b.csv", "c.py"):
        (tmp_path / name).write_text("colour,number\nred,1\n")
    tab.goto(page.url)
    tab.set_input_files("#nb-prompt input[type=file]", [tmp_path / name for name in ("a.md", "b.csv", "c.py")])
    tab.wait_for_selector(".nb-files")
    assert "3 files" in tab.locator(".nb-files").inner_text()
    tab.locator("#nb-prompt textarea").fill("Which number has red?")
    shot("files")
    tab.click("#nb-send")
    answers = answered()
    assert len(answers) == 3
    assert all(answer.strip() for answer in answers)
    assert "b.csv" in tab.locator("[data-testid=user]").first.inner_text()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    shot("answers")

    tab.locator("button[aria-label=Edit], button[title=Edit]").nth(1).click()  # the first is that of the files
    tab.locator(".nb-chat textarea").first.fill("Name three colours.")
    tab.locator("button[aria-label=Submit], button[title=Submit]").first.click()
    tab.wait_for_function("() => document.querySelector('.nb-live')")
    answered()
    asked = tab.locator("[data-testid=user]").all_inner_texts()
    assert sum("Name three colours." in text for text in asked) == 3
    assert not any("Which number" in text for text in asked)

    tab.click("#nb-blind")
    tab.wait_for_function("() => document.querySelector('#nb-blind').innerText.includes('✓')")
    tab.locator("#nb-prompt textarea").fill(QUESTION)
    tab.click("#nb-send")
    answered()
    shot("blind")
    counted = tab.locator(".nb-standings").inner_text()
    tab.locator("button.nb-vote:visible").first.click()
    tab.wait_for_selector(".nb-told")
    assert tab.locator(".nb-standings").inner_text() != counted
    shot("voted")
    tab.get_by_role("tab", name="Votes").click()
    tab.wait_for_selector(".nb-ranking table")
    shot("ranking")
    assert [url for url in foreign if not url.startswith(("data:", "blob:"))] == []
    tab.close()


def test_a_taken_port_is_a_clear_error(page, runs_dir, monkeypatch):
    monkeypatch.setattr("nbtune.compare.arena._open", None)
    with pytest.raises(NbtuneError, match="port is taken"):
        arena(runs_dir=runs_dir, port=int(page.url.rpartition(":")[2]))


def test_a_page_with_a_password_asks_for_it(tmp_path, tiny_model, monkeypatch):
    from nbtune.spec import ModelSpec

    monkeypatch.setattr("nbtune.compare.arena._open", None)
    with arena(ModelSpec(name=str(tiny_model)), runs_dir=tmp_path, password="open sesame") as opened:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{opened.url}/config")
        assert caught.value.code == 401
        Client(opened.url, auth=("nbtune", "open sesame"), verbose=False)


def test_a_new_arena_closes_the_one_before_and_wait_returns(tmp_path):
    first = arena(launch=False, runs_dir=tmp_path)
    assert first.url is None
    waiting = threading.Thread(target=first.wait)
    waiting.start()
    second = arena(launch=False, runs_dir=tmp_path)
    waiting.join(20)
    assert not waiting.is_alive()
    second.close()
    second.close()


def test_gradio_and_torch_are_imported_only_with_the_arena():
    modules = "nbtune.infer.columns, nbtune.infer.sampling, nbtune.compare.conversation"
    code = f"import sys, {modules}; print([name for name in ('gradio', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == []
