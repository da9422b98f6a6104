from __future__ import annotations

import csv
import json
import math
import random
import re
import sys

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

import nbtune as nt
from nbtune import cli
from nbtune.compare import promptset
from nbtune.compare import results as results_module
from nbtune.compare.likeness import rouge_1, rouge_l, same, words
from nbtune.compare.prompts import read_prompts, tokens_of
from nbtune.compare.promptset import Evaluation, evaluate
from nbtune.compare.results import Cell, ResultRow, Results
from nbtune.data import encode
from nbtune.errors import DataError, NbtuneError
from nbtune.infer import likelihood
from nbtune.infer.engine import Engine
from nbtune.infer.sampling import GREEDY
from nbtune.models import load
from nbtune.peft import PeftModel, PromptTuningConfig, get_peft_model
from nbtune.spec import DataSpec, ModelSpec, RunSpec

SPEC = ModelSpec(name="smollm2-135m-instruct", dtype="float32")
ROWS = [
    {"prompt": "What is the capital of France?", "completion": "The capital of France is Paris."},
    {"prompt": "Count to three.", "completion": "one, two, three"},
    {"prompt": "Say yes.", "completion": "Yes."},
]


@pytest.fixture(scope="module")
def tiny(tiny_model, tmp_path_factory):
    """A base of two small layers, and an adapter with a prompt of five trained tokens."""
    folder = tmp_path_factory.mktemp("prompted")
    model = get_peft_model(load(ModelSpec(name=str(tiny_model))).model, PromptTuningConfig(num_virtual_tokens=5))
    model.save_pretrained(folder)
    return Engine(ModelSpec(name=str(tiny_model), dtype="float32"), {"prompted": folder})


def through(engine, data, **how):
    evaluation = Evaluation(engine, read_prompts(data), **{"max_new_tokens": 4, **how})
    *_, last = evaluation.steps()
    return evaluation.results(), last


def ids_of(row, engine):
    (prompt,) = read_prompts([row]).prompts
    return tokens_of(prompt, engine.tokenizer)


# How likely a reference is


def test_a_score_is_the_loss_that_transformers_computes(engine, adapters):
    loaded = load(SPEC)
    messages = [{"role": "user", "content": ROWS[0]["prompt"]}, {"role": "assistant", "content": ROWS[0]["completion"]}]
    (example,) = encode(messages, loaded.tokenizer)
    ids, labels = (torch.tensor(part[None].astype(np.int64)) for part in (example.input_ids, example.labels))
    prompt, reference = ids_of(ROWS[0], engine)
    assert (prompt + reference) == example.input_ids[: len(prompt + reference)].tolist()
    assert len(reference) == example.supervised
    seen = set()
    for column in engine.columns:
        model = loaded.model if column == "base" else PeftModel.from_pretrained(loaded.model, adapters[column])
        with torch.inference_mode():
            expected = float(model(input_ids=ids, labels=labels).loss)
        if column != "base":
            model.unload()
        score = engine.score(column, prompt, reference)
        assert score.tokens == len(reference)
        assert score.loss / score.tokens == pytest.approx(expected, abs=1e-4)
        seen.add(round(expected, 3))
    assert len(seen) == 3


@pytest.mark.parametrize("column", ["base", "prompted"])
def test_a_long_reference_is_read_in_pieces_to_the_same_score(tiny, column, monkeypatch):
    ids = torch.randint(0, 1000, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    at_once = tiny.score(column, ids[:9], ids[9:])
    by_one = sum(tiny.score(column, ids[:end], ids[end : end + 1]).loss for end in range(9, 60))
    monkeypatch.setattr(likelihood, "PIECE", 7)
    assert tiny.score(column, ids[:9], ids[9:]).loss == pytest.approx(at_once.loss, abs=1e-3)
    assert by_one == pytest.approx(at_once.loss, abs=1e-3)


def test_scoring_changes_no_answer(engine):
    question = [{"role": "user", "content": "What is a list?"}]

    def answers():
        return [
            delta.token for delta in engine.stream(dict.fromkeys(engine.columns, question), GREEDY, max_new_tokens=4)
        ]

    before = answers()
    engine.score("quiet.otter", *ids_of(ROWS[0], engine))
    assert answers() == before


def test_what_cannot_be_scored_is_said(tiny):
    with pytest.raises(NbtuneError, match="no column 'none'"):
        tiny.score("none", [1], [2])
    with pytest.raises(NbtuneError, match="nothing to score"):
        tiny.score("base", [], [2])
    assert tiny.score("base", [1], [2] * 511).tokens == 511
    with pytest.raises(NbtuneError, match=r"prompted: 511 tokens; .* reads 507"):
        tiny.score("prompted", [1], [2] * 511)
    with pytest.raises(NbtuneError, match="longer than the model's context"):
        tiny.score("base", [1], [2] * 512)


# How like an answer is to its reference


def test_rouge_is_that_of_rouge_score():
    draw = random.Random(0)
    scorer = RougeScorer(["rouge1", "rougeL"])
    texts = [
        " ".join(draw.choices(["the", "Cat", "sat,", "on", "a_b", "3.5", "mat!"], k=draw.randrange(30)))
        for _ in range(80)
    ]
    for answer, reference in zip(texts[::2], texts[1::2], strict=True):
        expected = scorer.score(reference, answer)
        assert rouge_1(words(answer), words(reference)) == pytest.approx(expected["rouge1"].fmeasure)
        assert rouge_l(words(answer), words(reference)) == pytest.approx(expected["rougeL"].fmeasure)


def test_words_of_any_script_count():
    assert words("Größe, naïve x_1") == ["größe", "naïve", "x", "1"]
    assert words("東京都 is カナ") == ["東", "京", "都", "is", "カ", "ナ"]
    assert rouge_l(words("東京"), words("東京都")) == pytest.approx(0.8)
    assert rouge_1([], ["a"]) == rouge_l([], []) == 0


def test_an_exact_match_ignores_space_and_case():
    assert same(" The  capital\nis PARIS ", "the capital is Paris")
    assert not same("Paris", "Paris.")


# The whole


def test_every_column_answers_as_the_engine_does(engine):
    results, progress = through(engine, ROWS[:2], max_new_tokens=3)
    assert (progress.done, progress.total, progress.eta_seconds) == (6, 6, 0)
    assert [row.place for row in results.rows] == ["row 1", "row 2"]
    for row, asked in zip(results.rows, ROWS, strict=False):
        assert (row.prompt, row.reference) == (asked["prompt"], asked["completion"])
        question = [{"role": "user", "content": asked["prompt"]}]
        for column in engine.columns:
            deltas = engine.stream({column: question}, GREEDY, max_new_tokens=3)
            cell = row.cells[column]
            assert cell.answer == "".join(delta.text for delta in deltas)
            assert cell.rouge_1 == rouge_1(words(cell.answer), words(asked["completion"]))
            assert cell.problem == ""
    metrics = results.metrics()[1]
    cells = [row.cells["amber-heron"] for row in results.rows]
    expected = math.exp(sum(cell.loss for cell in cells) / sum(cell.reference_tokens for cell in cells))
    assert metrics.perplexity == pytest.approx(expected)
    assert metrics.mean_tokens == pytest.approx(np.mean([cell.tokens for cell in cells]))
    assert metrics.tokens_per_second > 0
    assert metrics.against_base == {}  # two rows tell nothing


def test_columns_one_after_another_answer_the_same(tiny):
    together, _ = through(tiny, ROWS)
    apart, _ = through(tiny, ROWS, column_by_column=True)
    for one, other in zip(together.rows, apart.rows, strict=True):
        for column in tiny.columns:
            assert one.cells[column].answer == other.cells[column].answer
            assert one.cells[column].loss == pytest.approx(other.cells[column].loss, abs=1e-3)


@pytest.mark.parametrize(("columns", "expected"), [(True, [8, 2]), (False, [4, 4, 2])])
def test_a_batch_is_bounded(tiny, monkeypatch, columns, expected):
    monkeypatch.setattr(promptset, "ROWS_AT_ONCE", 8)
    evaluation = Evaluation(tiny, read_prompts(["short"] * 10), column_by_column=columns)
    assert [len(rows) for rows in evaluation._chunks()] == expected
    monkeypatch.setattr(promptset, "TOKENS_AT_ONCE", 2 * 2 * 300)
    long = Evaluation(tiny, read_prompts(["word " * 200, "word " * 200, "word " * 200, "short"]), max_new_tokens=10)
    assert [len(rows) for rows in long._chunks()] == [2, 2]


def test_progress_counts_every_answer_and_stops_at_any_moment(tiny):
    evaluation = Evaluation(tiny, read_prompts([*ROWS] * 6), max_new_tokens=3)
    seen = []
    for progress in evaluation.steps(lambda: len(seen) > 20):
        seen.append(progress)
    assert [progress.done for progress in seen] == list(range(len(seen)))
    assert seen[0].eta_seconds is None
    assert {progress.total for progress in seen} == {36}
    results = evaluation.results()
    assert 8 <= len(results.rows) < 18
    assert all(
        cell.answer is not None and cell.finished != "stopped" for row in results.rows for cell in row.cells.values()
    )
    assert results.notes[-1] == f"Stopped after {len(results.rows)} of 18 rows."
    assert results.metrics()[0].rows == len(results.rows)


def test_leaving_the_iterator_frees_the_engine(tiny):
    evaluation = Evaluation(tiny, read_prompts(ROWS), max_new_tokens=200)
    steps = evaluation.steps()
    next(steps)
    next(steps)
    steps.close()
    assert len(evaluation.results().rows) < 3
    assert through(tiny, ROWS[:1])[1].done == 2


def test_rows_that_cannot_be_read_say_so_and_others_go_on(tiny):
    longest = {"prompt": "word " * 600, "completion": "x"}
    half = {"prompt": "Why?", "completion": "word " * 600}
    results, progress = through(tiny, [ROWS[0], longest, half, ROWS[1]])
    assert progress.done == progress.total == 8
    good, long, long_reference, last = (row.cells["base"] for row in results.rows)
    assert good.problem == last.problem == ""
    assert long.answer is None
    assert long.loss is None
    assert "longer than the model's context" in long.problem
    assert long_reference.answer is not None
    assert long_reference.loss is None
    assert re.search("2 of 4 rows could not be used whole; row 2: .*longer", results.notes[-1])
    metrics = results.metrics()[0]
    assert metrics.rows == 3
    assert metrics.perplexity == pytest.approx(
        math.exp((good.loss + last.loss) / (good.reference_tokens + last.reference_tokens))
    )


def test_a_row_that_the_template_refuses_says_so(tiny, monkeypatch):
    refuse = "{% if messages[0].content == 'Say yes.' %}{{ raise_exception('No.') }}{% endif %}"
    monkeypatch.setattr(tiny.tokenizer, "chat_template", refuse + tiny.tokenizer.chat_template)
    results, _ = through(tiny, ROWS)
    assert [bool(row.cells["base"].problem) for row in results.rows] == [False, False, True]
    assert "the template says: No." in results.rows[2].cells["base"].problem
    alone, _ = through(tiny, ["Say yes.", "Say no."])
    assert [bool(row.cells["base"].problem) for row in alone.rows] == [True, False]


def test_prompts_without_a_reference_are_answered_and_that_is_said(tiny, tmp_path):
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps({"question": text, "id": 3}) + "\n" for text in ("Who?", "Where?")))
    chats = [{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]}]
    for data, first in ((["Who?", "Where?"], "Who?"), (file, "Who?"), (chats, "system: Be brief.\nuser: Who?")):
        results, _ = through(tiny, data)
        assert results.rows[0].prompt == first
        metrics = results.metrics()[0]
        assert (metrics.perplexity, metrics.exact_match, metrics.rouge_1, metrics.rouge_l) == (None,) * 4
        assert metrics.mean_tokens > 0
        assert results.notes == (
            "No row has a reference: there are answers and speeds, and nothing to measure them by.",
        )


def test_the_last_answer_of_a_chat_is_its_reference(tiny):
    said = [("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "So long."), ("user", "?")]
    row = {"messages": [{"role": role, "content": text} for role, text in said]}
    (prompt,) = read_prompts([row]).prompts
    assert (prompt.text, prompt.reference) == ("user: Hi\nassistant: Hello.\nuser: Bye", "So long.")
    ids, reference = tokens_of(prompt, tiny.tokenizer)
    assert ids == tiny.prompt("base", row["messages"][:3])
    assert tiny.tokenizer.decode(reference) == "So long.<|im_end|>"


def test_plain_text_has_a_perplexity_and_no_answer(tiny):
    results, progress = through(tiny, [{"text": "It was a dark and stormy night."}])
    cell = results.rows[0].cells["base"]
    assert progress.done == 2
    assert cell.answer is None
    assert 1 < cell.perplexity < 1e6
    assert results.metrics()[0].exact_match is None


@pytest.mark.parametrize(
    ("data", "how", "said"),
    [
        ([], {}, "no prompts"),
        (["a"], {"limit": 0}, "limit is 0"),
        ([{"colour": "red"}], {}, "form of the data is not known"),
        ("nowhere.jsonl", {}, "nowhere.jsonl"),
        ([3], {}, "no rows"),
    ],
)
def test_data_that_holds_no_prompts_is_refused(data, how, said):
    with pytest.raises(DataError, match=said):
        read_prompts(data, **how)


def test_held_out_rows_are_used_where_there_are_any():
    rows = [{"prompt": f"Number {n}?", "completion": f"{n}."} for n in range(20)]
    spec = DataSpec.from_rows(rows, eval_fraction=0.3)
    held_out = read_prompts(spec)
    assert len(held_out.prompts) == 6
    assert [prompt.place for prompt in read_prompts(spec, limit=2).prompts] == [p.place for p in held_out.prompts[:2]]
    assert len(read_prompts(spec, all_rows=True).prompts) == len(read_prompts(rows).prompts) == 20
    none = read_prompts(DataSpec.from_rows(rows, eval_fraction=0))
    assert len(none.prompts) == 20
    assert none.notes == ("No rows are held out: these are rows that the data trains on.",)


# Differences


def made(base, other, name="rouge_l"):
    """Results whose cells have nothing but these values of a measure."""

    def cell(value):
        if name == "perplexity":
            return Cell(loss=value, reference_tokens=10)
        return Cell(answer="x", tokens=1, **{name: value})

    rows = [
        ResultRow(f"row {n}", "", "", {"base": cell(one), "run": cell(two)})
        for n, (one, two) in enumerate(zip(base, other, strict=True), 1)
    ]
    return Results(("base", "run"), tuple(rows))


def test_a_difference_is_real_where_it_holds_row_by_row():
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 0.8, 60)
    (better,) = made(base, base + rng.normal(0.05, 0.05, 60)).metrics()[1].against_base.values()
    assert better.real
    assert better.lower < better.value < better.upper
    (shuffled,) = made(base, rng.permutation(base)).metrics()[1].against_base.values()
    assert shuffled.value == pytest.approx(0, abs=1e-9)
    assert not shuffled.real
    assert made(base[:9], base[:9] + 0.1).metrics()[1].against_base == {}
    assert made(base, base).metrics()[0].against_base == {}


def test_the_interval_of_a_mean_is_the_textbook_one():
    rng = np.random.default_rng(1)
    gaps = rng.normal(0.03, 0.1, 200)
    (found,) = made(np.zeros(200), gaps).metrics()[1].against_base.values()
    error = gaps.std(ddof=1) / math.sqrt(200)
    assert (found.lower, found.upper) == pytest.approx(
        (gaps.mean() - 1.96 * error, gaps.mean() + 1.96 * error), abs=2e-3
    )
    assert made(np.zeros(200), gaps).metrics() == made(np.zeros(200), gaps).metrics()


def test_perplexity_is_of_all_tokens_together():
    metrics = made([10.0, 30.0] * 6, [5.0, 25.0] * 6, "perplexity").metrics()
    assert metrics[0].perplexity == pytest.approx(math.e**2)
    assert metrics[1].against_base["perplexity"].value == pytest.approx(math.e**1.5 - math.e**2)
    assert metrics[1].against_base["perplexity"].real


# Files


@pytest.fixture
def odd():
    """Results with what files trip over."""
    cell = Cell(answer='=HYPERLINK("http://x")', finished="end_of_turn", tokens=2, loss=math.nan, reference_tokens=3)
    rows = [
        ResultRow(
            "row 1",
            "a|b\n<script>alert(1)</script> `x`",
            "-5",
            {"base": cell, "quiet.otter (2)": Cell("\t@SUM", tokens=1)},
        ),
        ResultRow("row 2", 'Ä, "q"', None, {"base": Cell(problem="too long"), "quiet.otter (2)": Cell("+1", tokens=1)}),
    ]
    return Results(("base", "quiet.otter (2)"), tuple(rows), ("a note",))


def test_a_csv_holds_no_formula(odd, tmp_path):
    path = odd.write(tmp_path / "new" / "out.csv")
    with path.open(encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert first["base answer"] == '\'=HYPERLINK("http://x")'
    assert first["quiet.otter (2) answer"] == "'\t@SUM"
    assert first["reference"] == "'-5"
    assert second["quiet.otter (2) answer"] == "'+1"
    assert second["prompt"] == 'Ä, "q"'
    assert second["base problem"] == "too long"


def test_json_holds_everything(odd, tmp_path):
    lines = [json.loads(line) for line in odd.write(tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    whole = json.loads(odd.write(tmp_path / "out.json").read_text(encoding="utf-8"))
    assert lines == whole["rows"]
    assert lines[0]["base answer"] == '=HYPERLINK("http://x")'
    assert lines[0]["base perplexity"] is None
    assert whole["notes"] == ["a note"]
    assert [metrics["column"] for metrics in whole["metrics"]] == ["base", "quiet.otter (2)"]


def test_markdown_is_a_table_whatever_was_said(odd, tmp_path):
    text = odd.write(tmp_path / "out.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if "script" in line)
    assert r"a\|b<br>&lt;script&gt;alert(1)&lt;/script&gt; \`x\`" in row
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()[-4:]}) == 1
    assert "- a note" in text


def test_nothing_is_overwritten(odd, tmp_path):
    path = odd.write(tmp_path / "out.json")
    before = path.read_bytes()
    with pytest.raises(NbtuneError, match="is there already"):
        odd.write(path)
    with pytest.raises(NbtuneError, match="does not end in"):
        odd.write(tmp_path / "out.xlsx")
    (tmp_path / "file").write_text("")
    with pytest.raises(NbtuneError, match="cannot be written"):
        odd.write(tmp_path / "file" / "out.json")
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "out.json"]


def test_results_of_nothing_are_written_too(tmp_path):
    empty = Results(("base",), ())
    for suffix in results_module.SUFFIXES:
        assert empty.write(tmp_path / f"empty{suffix}").exists()
    assert empty.metrics()[0].rows == 0


# The doors


@pytest.fixture
def tiny_run(tiny_model, tmp_path):
    """A run on the tiny base, trained on rows of which a quarter are held out."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Number {n}?", "completion": f"{n}."}) + "\n" for n in range(12)))
    spec = RunSpec(model=ModelSpec(name=str(tiny_model)), data=DataSpec(source=str(data), eval_fraction=0.25))
    run = tmp_path / "runs" / "amber-heron"
    get_peft_model(load(spec.model).model, nt.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        run / "adapter"
    )
    (run / "spec.yaml").write_text(spec.to_yaml())
    return run


def test_a_run_is_measured_on_what_it_held_out(tiny_run):
    data = str(tiny_run.parent.parent / "rows.jsonl")
    seen = []
    how = {"runs_dir": tiny_run.parent, "max_new_tokens": 2}
    results = nt.evaluate(data, "base", "amber-heron", on_progress=seen.append, **how)
    assert results.columns == ("base", "amber-heron")
    held_out = read_prompts(RunSpec.from_yaml(tiny_run / "spec.yaml").data)
    assert [row.prompt for row in results.rows] == [prompt.text for prompt in held_out.prompts]
    assert len(results.rows) == 3
    assert (seen[-1].done, seen[-1].total) == (6, 6)
    assert results.notes == (
        "These are rows that amber-heron held out; --all-rows (all_rows=True) takes the others too.",
    )
    base, run = (results.rows[0].cells[name].loss for name in results.columns)
    assert run == pytest.approx(base, abs=1e-4)  # B is zero: a new LoRA changes nothing


def test_an_interrupt_keeps_what_is_done(tiny_run):
    def interrupt(progress):
        if progress.done == 20:
            raise KeyboardInterrupt

    data = [{"prompt": f"{n}?", "completion": str(n)} for n in range(24)]
    file = tiny_run.parent / "other.jsonl"  # which nobody was trained on: all rows, and nothing to say of that
    file.write_text("".join(json.dumps(row) + "\n" for row in data))
    results = evaluate(file, str(tiny_run), max_new_tokens=2, on_progress=interrupt)
    assert 8 <= len(results.rows) < 24
    assert results.notes == (f"Stopped after {len(results.rows)} of 24 rows.",)


def test_the_command_prints_the_measures_and_writes_the_file(tiny_run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.csv"

    def call(*arguments):
        monkeypatch.setattr(
            sys, "argv", ["nbtune", "evaluate", *map(str, arguments), "--runs-dir", str(tiny_run.parent)]
        )
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    data = tmp_path / "rows.jsonl"
    code, said, _ = call(data, "amber-heron", "--all-rows", "--limit", 2, "--max-new-tokens", 2, "--out", out)
    assert code == 0
    assert re.search(r"^\s+base\s+amber-heron\s*$", said, re.MULTILINE)
    assert re.search(r"^perplexity\s+[\d.]+\s+[\d.]+\s*$", said, re.MULTILINE)
    assert f"Written: {out}" in said.replace("\n", "")
    with out.open(encoding="utf-8", newline="") as file:
        assert [row["prompt"] for row in csv.DictReader(file)] == ["Number 0?", "Number 1?"]
    code, _, error = call(data, "--out", out)
    assert code == 1
    assert "is there already" in error
