"""The Data step in plain Python: buttons clicked, settings and texts read. The tokenizer and its template are real."""

import html
import json
import os
import re
from pathlib import Path

import ipywidgets
import numpy as np
import pytest

import nbtune as nt
from nbtune.data.report import Piece
from nbtune.errors import DataError
from nbtune.spec import DataSpec
from nbtune_widgets import _lengths, _offers, _tokens
from nbtune_widgets._page import Host
from nbtune_widgets.data import DataPage
from nbtune_widgets.mapping import TEXT
from nbtune_widgets.specform import SpecForm

ROWS = [{"instruction": f"Say <b>{n}</b>.", "input": "", "output": f"It is {n}."} for n in range(1, 41)]


class Bench:
    """A page over a real form: what it asks for is done at once, what it changes is read at once."""

    def __init__(self, **start):
        self.form = SpecForm(lambda part, name: None)
        self.error = None

        def act(function):
            return lambda _: function()

        def button(text, function, tooltip=""):
            made = ipywidgets.Button(description=text, tooltip=tooltip)
            made.on_click(act(function))
            return made

        def ask(key, status, work, idle=False):
            work()

        def ignore(*_):
            pass

        self.page = DataPage(self.form, Host(act, button, self.change, ignore, ignore, ask))
        self.form.set(**start)
        self.read()

    @property
    def spec(self):
        return self.form.spec

    def change(self, changes, why):
        self.form.load(self.form.spec.updated(**changes))
        self.read()

    def read(self):
        try:
            self.page.refresh(self.spec)
            self.error = None
        except DataError as error:
            self.error = error


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Bench(data=ROWS, max_length=256)


def plain(text):
    """What a person reads of a piece of HTML."""
    return html.unescape(re.sub(r"<[^>]*>", "", text))


def test_what_was_found_in_the_rows(bench):
    facts = plain(bench.page.facts.value)
    assert "alpaca: columns instruction, input, output" in facts
    assert "40 rows · 38 train · 2 held out" in facts
    assert "rows given in Python" in facts
    assert "left out" not in facts
    assert bench.page.warnings.children == ()
    assert bench.page.dropped.value == ""


def test_a_row_is_shown_token_by_token_with_its_loss(bench):
    shown = bench.page.preview.text.value
    assert '<span class="nt-t1"><i>It</i><i> is</i>' in shown
    assert '<span class="nt-tE"><i class="nt-special">&lt;|im_end|&gt;</i></span>' in shown
    assert "<b>1" not in shown.replace('<b class="nt-cut">', "")  # shown, not interpreted
    text = plain(shown).replace("↵", "")
    assert "<|im_start|>user\nSay <b>1</b>.<|im_end|>" in text
    assert re.search(r"trained on|held out", plain(bench.page.preview.note.value))
    tokens, learnt = map(int, re.findall(r"(\d+) tokens, (\d+) with loss", bench.page.preview.note.value)[0])
    assert tokens == bench.page.report.lengths[bench.page.report.numbers == 1].item()
    assert learnt == 6  # It, is, blank, 1, ., <|im_end|>


def test_rows_are_walked_in_the_order_of_the_source(bench):
    preview = bench.page.preview
    assert preview.number.value == 1
    preview.next.click()
    assert preview.number.value == 2
    assert "Say <b>2" in plain(preview.text.value)
    preview.back.click()
    preview.back.click()
    assert preview.number.value == 40
    preview.next.click()
    assert preview.number.value == 1
    used = [plain(preview.note.value)]
    for _ in range(39):
        preview.next.click()
        used.append(plain(preview.note.value))
    assert sum(note.startswith("held out") for note in used) == 2
    assert sum(note.startswith("trained on") for note in used) == 38


def test_a_row_as_it_is_in_the_source(bench):
    bench.page.preview.raw.value = True
    bench.page.preview.number.value = 7
    assert json.loads(plain(bench.page.preview.text.value)) == ROWS[6]
    bench.page.preview.raw.value = False
    assert "It is 7." in plain(bench.page.preview.text.value)


def test_rows_that_are_left_out_can_be_looked_at():
    bench = Bench(data=[*ROWS, {"instruction": "Why?", "input": "", "output": " "}])
    assert "1 left out" in plain(bench.page.facts.value)
    assert "1 row left out: empty answer" in plain(bench.page.dropped.value)
    assert '"instruction": "Why?"' in plain(bench.page.dropped.value)
    bench.page.preview.number.value = 41
    assert plain(bench.page.preview.note.value) == "not used: empty answer"
    assert "Why?" in plain(bench.page.preview.text.value)
    bench.page.preview.next.click()
    assert bench.page.preview.number.value == 1  # the arrows go to rows that are used


def test_rows_that_cannot_be_used_are_dropped_by_a_button():
    bench = Bench(data=[*ROWS, {"instruction": "Why?", "input": "", "output": None}])
    (warning,) = bench.page.warnings.children
    assert "1 of 41 rows cannot be used row 41: `output` is null" in plain(warning.children[0].value)
    warning.children[1].click()
    assert [step.step for step in bench.spec.data.recipe] == ["usable"]
    assert bench.page.warnings.children == ()
    assert bench.page.report.kept == 40


@pytest.fixture
def long():
    rows = [*ROWS, *({"instruction": "Tell.", "input": "", "output": "word " * n} for n in (300, 400))]
    return Bench(data=rows, max_length=256)


def test_long_rows_are_counted_and_cut(long):
    (warning,) = long.page.warnings.children
    assert plain(warning.children[0].value) == "2 rows are longer than 256 tokens. Their ends would be cut."
    assert [button.description for button in warning.children[1:]] == ["drop them", "use 512"]
    assert "nt-over" in long.page.lengths.value
    assert '<b class="nt-limit' in long.page.lengths.value
    long.page.preview.number.value = 42
    shown = long.page.preview.text.value
    assert "cut here, after 256 tokens" in shown
    kept, cut = shown.split("<s>")
    assert kept.count("<i") == 256
    assert cut.count("<i") == long.page.report.lengths.max() - 256


def test_long_rows_are_dropped_by_a_button(long):
    long.page.warnings.children[0].children[1].click()
    (step,) = long.spec.data.recipe
    assert (step.step, step.of, step.unit, step.at_most) == ("length", "row", "tokens", 256)
    assert long.page.warnings.children == ()
    assert long.page.report.kept == 40
    assert "42 → 40 rows" in plain(long.page.recipe.lines.lines[0].title.value)
    assert long.page.doors.buttons["recipe"].description == "▸ Recipe · 1 step"


def test_a_greater_max_length_by_a_button(long):
    long.page.warnings.children[0].children[2].click()
    assert long.spec.training.max_length == 512
    assert long.page.warnings.children == ()
    assert long.page.report.kept == 42


def test_a_form_that_is_not_known_is_mended_by_choosing_columns(tmp_path):
    rows = [{"topic": "sums", "ask": f"{n} + {n}?", "say": f"{2 * n}."} for n in range(30)]
    path = tmp_path / "table.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bench = Bench(data=str(path))
    assert "form" in bench.error.title
    assert bench.page.doors.buttons["columns"].value
    parts = bench.page.mapping.parts
    assert bench.page.mapping.form.value == "prompt_completion"
    assert list(parts["prompt"].column.options)[1:4] == [("topic", "topic"), ("ask", "ask"), ("say", "say")]
    assert "Choose what prompt and completion is made of." in bench.page.mapping.missing.value
    parts["completion"].column.value = "say"
    assert bench.spec.data.columns is None  # not complete
    parts["prompt"].column.value = TEXT
    parts["prompt"].text.value = "About {topic}:\n{ask}"
    assert bench.error is None
    assert bench.spec.data.columns == {"prompt": "About {topic}:\n{ask}", "completion": "say"}
    assert bench.spec.data.format == "prompt_completion"
    bench.page.preview.number.value = 4
    assert "user\nAbout sums:\n3 + 3?<|im_end|>" in plain(bench.page.preview.text.value).replace("↵", "")
    bench.page.mapping.as_found.click()
    assert bench.spec.data.columns is None
    assert bench.error is not None


def test_a_wrong_detection_is_corrected(bench):
    mapping = bench.page.mapping
    assert mapping.form.value == "alpaca"
    assert {name: line.value for name, line in mapping.parts.items()} == {
        "instruction": "instruction", "output": "output", "input": "input", "system": ""}  # fmt: skip
    mapping.form.value = "prompt_completion"
    assert "Choose what prompt and completion is made of." in mapping.missing.value
    mapping.parts["prompt"].column.value = "output"
    mapping.parts["completion"].column.value = "instruction"
    assert bench.spec.data.columns == {"prompt": "output", "completion": "instruction"}
    assert '<span class="nt-t1"><i>Say</i>' in bench.page.preview.text.value
    assert bench.page.doors.buttons["columns"].description.endswith("Columns · chosen")


def test_steps_are_added_edited_moved_and_taken_away(bench):
    recipe = bench.page.recipe
    recipe.kind.value = "filter"
    recipe.add_button.click()
    (line,) = recipe.lines.lines
    assert bench.spec.data.recipe == []  # it says nothing yet
    line.fields["where"].control.value = "len(output) >"
    assert "cannot be read" in plain(line.wrong.value)
    line.fields["where"].control.value = '"1" not in output'
    assert line.wrong.value == ""
    assert bench.spec.data.recipe[0].where == '"1" not in output'
    used = [n for n in range(1, 41) if "1" not in str(n)]
    assert bench.page.report.kept == len(used)
    assert f"40 → {len(used)} rows, {40 - len(used)} dropped" in plain(line.title.value)
    recipe.add("sample")
    assert bench.spec.data.recipe[1].rows == 1000
    recipe.lines.lines[1].fields["rows"].control.value = "10"
    assert bench.page.report.kept == 10
    recipe.lines.lines[1].up.click()
    assert [step.step for step in bench.spec.data.recipe] == ["sample", "filter"]
    assert "40 → 10 rows" in plain(recipe.lines.lines[0].title.value)
    recipe.lines.lines[0].remove.click()
    recipe.lines.lines[0].remove.click()
    assert bench.spec.data.recipe == []
    assert bench.page.report.kept == 40


def test_every_step_of_a_recipe_can_be_added(bench):
    for value in [value for _, value in bench.page.recipe.kind.options]:
        bench.page.recipe.add(value)
    bench.page.recipe.lines.lines[0].fields["where"].control.value = "output != ''"
    assert [step.step for step in bench.spec.data.recipe] == [
        "filter", "length", "deduplicate", "decontaminate", "sample", "usable"]  # fmt: skip
    assert bench.error is None


def test_a_recipe_of_the_settings_fills_the_list(bench):
    steps = [{"step": "deduplicate", "similarity": 0.9}, {"step": "length", "at_least": 3, "unit": "words"}]
    bench.change({"data.recipe": steps}, "")
    lines = bench.page.recipe.lines.lines
    assert [line.fields.keys() for line in lines] == [{"of", "similarity"}, {"of", "unit", "at_least", "at_most"}]
    assert lines[0].fields["similarity"].value == 0.9
    assert lines[1].fields["at_least"].value == 3
    assert bench.page.recipe.lines.values == bench.spec.data.recipe


def test_lines_that_are_taken_away_leave_no_widgets_behind(bench):
    instances = ipywidgets.widgets.widget._instances
    before = len(instances)
    for _ in range(2):
        bench.page.recipe.add("sample")
        bench.page.mix.add_button.click()
        bench.page.recipe.lines.lines[0].remove.click()
        bench.page.mix.lines.lines[0].remove.click()
    assert len(instances) == before


def test_sources_are_mixed_by_weight(bench):
    bench.page.mix.add_button.click()
    (line,) = bench.page.mix.lines.lines
    assert bench.spec.data.mix[0].source == "stdlib-docs"
    line.fields["weight"].control.value = "0.5"
    assert bench.page.report.kept == 60
    assert "0.5 rows for each row" in plain(line.title.value)
    assert bench.page.doors.buttons["mix"].description == "▸ Mix · 1 source"
    line.remove.click()
    assert bench.page.report.kept == 40


def test_the_models_own_template_is_named_and_checked(bench):
    template = bench.page.template
    assert template.choice.value == "the model's own"
    assert template.said == "the model's, like ChatML ✓"
    assert plain(template.checks.value).count("✓") == 6
    assert "✗" not in template.checks.value


def test_a_standard_template_shows_what_does_not_suit_the_model(bench):
    bench.page.template.choice.value = "llama3"
    assert bench.spec.model.chat_template == "llama3"
    assert "<|start_header_id|>user<|end_header_id|>" in plain(bench.page.preview.text.value)
    assert "<|eot_id|> is no token of this model" in plain(bench.page.template.checks.value)
    assert bench.page.template.said == "llama3"
    bench.page.template.choice.value = "the model's own"
    assert bench.spec.model.chat_template is None
    assert "<|im_start|>user" in plain(bench.page.preview.text.value)


def test_a_template_is_tried_on_the_row_before_it_is_used(bench):
    template = bench.page.template
    bench.page.preview.number.value = 5
    assert template.use.disabled
    changed = template.text.value.replace("<|im_start|>", "<|im_start|>the ")
    assert changed != template.text.value
    template.text.value = changed
    assert "<|im_start|>the user" in plain(template.trial.value)
    assert "Say <b>5</b>." in plain(template.trial.value)
    assert bench.spec.model.chat_template is None
    template.text.value = "{% for message in messages %}{{ message.content }"
    assert "✗" in template.trial.value
    template.undo.click()
    assert plain(template.trial.value).startswith("Change the text")
    template.text.value = changed
    template.use.click()
    assert bench.spec.model.chat_template == changed
    assert template.choice.value == "your own text"
    assert "<|im_start|>the user" in plain(bench.page.preview.text.value)


def test_a_model_without_template_gets_a_choice_of_standard_ones(bench):
    bench.page._tokenizer.chat_template = None  # as of a base model; it is kept until another model is named
    bench.read()
    assert bench.error.title == "The model has no chat template"
    template = bench.page.template
    assert template.choice.options == ("none: choose one", "chatml", "llama3", "gemma", "mistral", "phi3", "zephyr")
    assert bench.page.doors.buttons["chat template"].value
    (warning,) = bench.page.warnings.children
    assert "has no chat template" in plain(warning.children[0].value)
    template.choice.value = "zephyr"
    assert bench.error is None
    assert bench.spec.model.chat_template == "zephyr"
    assert "<|user|>\nSay <b>1</b>." in plain(bench.page.preview.text.value).replace("↵", "")


def test_a_template_that_rewrites_earlier_turns_makes_an_example_of_each(bench):
    turns = [("user", "One?"), ("assistant", "<think>1</think>1"), ("user", "Two?"), ("assistant", "<think>2</think>2")]
    bench.change({"data": [{"messages": [{"role": role, "content": text} for role, text in turns]}] * 8}, "")
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    bench.change({"model.chat_template": template}, "")
    assert len(bench.page.report.lengths) == 2 * bench.page.report.kept
    shown = plain(bench.page.preview.text.value)
    assert "example 1 of 2" in shown
    assert "example 2 of 2" in shown
    assert "✗earlier turns stay as they are" in plain(bench.page.template.checks.value)


def test_a_table_of_the_notebook_is_data(bench, monkeypatch):
    import pandas

    frame = pandas.DataFrame([{"question": f"{n}?", "answer": f"{n}!"} for n in range(25)])
    monkeypatch.setattr(_offers, "_variables", lambda: {"quiz": frame, "_hidden": frame, "rows": ROWS, "n": [1, 2]})
    bench.read()
    picker = bench.page.source
    assert [button.description for name, button in picker.buttons.items() if name in ("quiz", "rows", "n")] == [
        "quiz · 25 rows", "rows · 40 rows"]  # fmt: skip
    picker.buttons["quiz"].click()
    assert bench.spec.data.source.startswith("memory:")
    assert bench.page.report.total == 25
    assert plain(bench.page.facts.value).startswith("quiz")
    assert "columns question and answer" in plain(bench.page.facts.value)
    assert "nt-on" in picker.buttons["quiz"]._dom_classes


def test_a_file_near_the_notebook_is_data(bench, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "chats.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n" * 2)
    (tmp_path / "README.md").write_text("no rows")
    bench.read()
    picker = bench.page.source
    assert bench.form.fields["data.source"].control.options == (
        "stdlib-docs", "README.md", "more/chats.jsonl")  # fmt: skip
    assert list(picker.buttons) == ["stdlib-docs", "more/chats.jsonl"]
    picker.buttons["more/chats.jsonl"].click()
    assert bench.page.report.total == 1
    assert bench.spec.data.rows is None
    assert plain(bench.page.facts.value).startswith("chats.jsonl")


def test_another_source_is_shown_from_its_first_row(bench):
    bench.page.preview.number.value = 30
    bench.change({"training.max_length": 128}, "")
    assert bench.page.preview.number.value == 30
    bench.change({"data": ROWS[4:]}, "")
    assert bench.page.preview.number.value == 1
    assert "Say <b>5</b>" in plain(bench.page.preview.text.value)


def test_pasted_rows_are_data(bench):
    picker = bench.page.source
    picker.open_paste.click()
    picker.paste.value = "question,answer\nOne?,1\nTwo?,2\nThree?,3\n"
    picker.use.click()
    assert bench.page.report.total == 3
    assert plain(bench.page.facts.value).startswith("pasted rows")
    assert bench.spec.data.rows == tuple({"question": q, "answer": a} for q, a in
                                         [("One?", "1"), ("Two?", "2"), ("Three?", "3")])  # fmt: skip


def test_another_source_keeps_the_recipe_and_forgets_the_columns(bench):
    bench.change({"data.columns": {"prompt": "output", "completion": "instruction"}, "data.seed": 3}, "")
    bench.page.source.choose("stdlib-docs")
    assert (bench.spec.data.source, bench.spec.data.columns, bench.spec.data.seed) == ("stdlib-docs", None, 3)
    assert bench.spec.data.rows is None


def test_data_that_is_not_there_shows_nothing_old(bench):
    bench.change({"data.source": "nothing.json"}, "")
    assert bench.error.title == "The data is not there"
    assert bench.page.facts.value == bench.page.lengths.value == bench.page.dropped.value == ""
    assert bench.page.preview.widget.layout.display == "none"


def test_plain_text_is_read_on_not_cut(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text("Once upon a time there was a row. " * 100)
    bench = Bench(data=str(path), max_length=64)
    assert bench.page.report.form == "text"
    assert not any("longer" in plain(warning.children[0].value) for warning in bench.page.warnings.children)
    assert "cut here" not in bench.page.preview.text.value


def test_white_space_is_seen_where_it_would_not_be():
    row = _tokens.row([Piece("a  b", "context"), Piece(" \n", "trained"), Piece("\tc<i>", "trained")], 10)
    assert row == (
        '<span class="nt-t0"><i>a<u>··</u>b</i></span>'
        '<span class="nt-t1"><i><u>·</u><u>↵</u>\n</i><i><u>⇥</u>\tc&lt;i&gt;</i></span>'
    )


def test_a_very_long_row_is_not_sent_whole():
    pieces = [Piece("x", "trained")] * 10_000
    assert _tokens.row(pieces, 20_000).count("<i>") == _tokens.SHOWN
    assert "7,000 more tokens are not shown" in _tokens.row(pieces, 20_000)
    assert "8,000 more tokens are not shown" in _tokens.row(pieces[:5000] * 2 + pieces[:1000], 500)


@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], list(range(20, 640)), [30] * 5000 + [40_000], [1, 100_000]])
def test_every_example_is_in_a_bar(lengths):
    drawn = _lengths.histogram(np.array(lengths, dtype=np.int32), 512)
    counts = [int(count.replace(",", "")) for count in re.findall(r"tokens: ([\d,]+)", drawn)]
    assert sum(counts) == len(lengths)
    assert 1 <= len(counts) <= 1.6 * _lengths.BARS
    assert ("nt-over" in drawn) == (max(lengths) > 600)


def test_what_holds_all_rows():
    assert _lengths.longer_than(np.array([513]), 512) == 1024
    assert _lengths.longer_than(np.array([1024]), 512) == 1024
    assert _lengths.longer_than(np.array([100]), 512) == 512


@pytest.fixture
def samples():
    folder = os.environ.get("NBTUNE_SAMPLE_DATA")
    if not folder:
        pytest.skip("NBTUNE_SAMPLE_DATA is not set")
    return Path(folder)


@pytest.mark.sample_data
def test_function_calls_that_the_models_template_does_not_write(samples):
    bench = Bench(data=str(samples / "glaive_toolcall_en_demo.json"))
    assert "does not write function calls" in bench.error.message
    assert bench.page.doors.buttons["chat template"].value
    (warning,) = bench.page.warnings.children
    warning.children[1].click()
    assert bench.error is None
    assert bench.spec.model.chat_template == "chatml"
    assert "300 rows" in plain(bench.page.facts.value)
    assert "sharegpt: columns conversations, tools" in plain(bench.page.facts.value)
    called = (
        '<tool_call>\n{"name": "search_recipes", "arguments": {"ingredients": ["chicken", "bell peppers", "rice"]}}'
    )
    assert called in plain(bench.page.preview.text.value).replace("↵", "")
    trained = "".join(re.findall(r'<span class="nt-t1">(.*?)</span>', bench.page.preview.text.value, re.DOTALL))
    assert called in plain(trained).replace("↵", "")
    assert "Chicken and Bell Pepper Stir Fry" in plain(trained)  # said by the assistant after the call
    assert "Slice the bell peppers. Cook the rice. Stir fry" in plain(bench.page.preview.text.value)


@pytest.mark.sample_data
@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("alpaca_en_demo.json", "alpaca: columns instruction, input, output"),
        ("dpo_en_demo.json", "preference"),
        ("c4_demo.jsonl", "text"),
        ("wiki_demo.txt", "text"),
    ],
)
def test_samples(samples, name, facts):
    bench = Bench(data=str(samples / name))
    assert bench.error is None
    assert facts in plain(bench.page.facts.value)
    assert bench.page.report.kept == len(set(bench.page.report.numbers.tolist())) > 0
    assert "nt-bars" in bench.page.lengths.value
    assert len(bench.page.preview.text.value) < 300_000


def test_the_page_of_a_spec_with_rows_keeps_them_until_another_source_is_named():
    spec = nt.RunSpec(data=DataSpec.from_rows(ROWS))
    assert spec.updated(**{"training.seed": 3}).data.rows == tuple(ROWS)
    assert spec.updated(**{"data.source": "rows.json"}).data.rows is None
    assert spec.updated(data=DataSpec.from_rows(ROWS[:3]), max_length=64).data.rows == tuple(ROWS[:3])
    assert spec.updated(data="stdlib-docs").data.rows is None
