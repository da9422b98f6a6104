"""The table of runs in plain Python: its rows, their order, what can be done with those that are selected."""

import json
import time

import ipywidgets
import plotly.graph_objects as go
import pytest
import replay
from filelock import FileLock

from nbtune.run import Run, runs
from nbtune_widgets import RunsView, _runtable, charts


@pytest.fixture
def folder(tmp_path):
    """Three runs: an hour, two and three hours old."""
    replay.write_run(tmp_path, "20261122-100000-amber-heron", 60, seed=0)
    replay.write_run(tmp_path, "20261122-090000-quiet-otter", 40, seed=1, learning_rate=1e-3, r=8)
    replay.write_run(tmp_path, "20261122-080000-stray-finch", 20, seed=2, status="stopped")
    return tmp_path


@pytest.fixture
def view(folder):
    made = RunsView(folder)
    yield made
    made.close()


def until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def names(view):
    """The runs in the order of the rows on the screen."""
    of_box = {line.box: run_id for run_id, line in view._lines.items()}
    return [of_box[box].split("-", 2)[2] for box in view._rows.children]


def press(view, button):
    """Click, and wait until the view's thread has done it."""
    done = []
    button.click()
    view._ask(lambda: done.append(True))
    until(lambda: done)


def select(view, *run_ids):
    done = []
    view.select(*run_ids)
    view._ask(lambda: done.append(True))
    until(lambda: done)


def shown(widget):
    return widget.layout.display is None


def test_a_row_says_what_there_is_to_know(view):
    assert names(view) == ["amber-heron", "quiet-otter", "stray-finch"]
    cells = view._lines["20261122-100000-amber-heron"]._cells.value
    summary = Run(view.folder / "20261122-100000-amber-heron").summary()
    for text in (">amber-heron<", "LoRA r16 · smollm2-135m-instruct · stdlib-docs", "finished", "60 of 60", "1 h"):
        assert text in cells
    assert f"3.730 → {summary['eval_loss_after']:.3f}" in cells
    assert f"{summary['train_tokens_per_second']:,.0f}" in cells
    assert "1.5" in cells  # GB
    assert cells.count("<polyline") == 1
    assert cells.count("<circle") == 4  # the evaluations


def test_sorting_by_a_column_and_back(view):
    press(view, view.heads["Run"])
    assert names(view) == ["amber-heron", "quiet-otter", "stray-finch"]
    press(view, view.heads["Run"])
    assert names(view) == ["stray-finch", "quiet-otter", "amber-heron"]
    assert view.heads["Run"].description == "Run ▾"
    press(view, view.heads["Held out"])
    losses = {run.name: run.summary()["eval_loss_after"] for run in runs(view.folder)}
    assert names(view) == sorted(losses, key=losses.get)
    assert view.heads["Run"].description == "Run"


def test_runs_without_a_number_stand_last_whatever_the_direction():
    facts = [
        _runtable.Facts(str(n), str(n), "", "", "created", 0, None, "", None, speed, None, None, "")
        for n, speed in enumerate([None, 5.0, 9.0])
    ]
    speed = next(column for column in _runtable.COLUMNS if column.name == "Tokens/s")
    assert [f.id for f in _runtable.ordered(facts, speed, descending=False)] == ["1", "2", "0"]
    assert [f.id for f in _runtable.ordered(facts, speed, descending=True)] == ["2", "1", "0"]
    assert "<div" in _runtable.row(facts[0])


def test_two_runs_show_only_what_differs_and_their_curves(view):
    select(view, "20261122-100000-amber-heron", "20261122-090000-quiet-otter")
    html = view._difference.value
    assert html.count("<tr>") == 4  # the head, and three settings
    for path, first, second in (("method.r", 16, 8), ("training.learning_rate", 0.0002, 0.001),
                                ("training.max_steps", 60, 40)):  # fmt: skip
        assert f"{path}</th><td>{first}</td><td>{second}</td>" in html
    figure = view.charts.outputs[0]["data"][charts.PLOTLY]
    assert len(go.Figure({"data": figure["data"], "layout": figure["layout"]}).data) == 4
    assert [trace["name"] for trace in figure["data"]] == ["amber-heron", "quiet-otter"] * 2
    assert figure["data"][0]["line"]["color"] == figure["data"][2]["line"]["color"] == charts.COLORS[0]
    assert [trace["x"][-1] for trace in figure["data"]] == [60, 40, 60, 40]
    assert "<svg" in view.charts.outputs[0]["data"]["image/svg+xml"]
    select(view, "20261122-100000-amber-heron")
    assert view.charts.outputs == ()
    assert not shown(view._difference)


def test_buttons_show_only_what_applies(view):
    buttons = (view.open_button, view.name_button, view.chat_button, view.delete_button)
    assert [shown(button) for button in buttons] == [False] * 4
    select(view, "20261122-100000-amber-heron")
    assert [shown(button) for button in buttons] == [True] * 4
    select(view, "20261122-100000-amber-heron", "20261122-090000-quiet-otter")
    assert [shown(button) for button in buttons] == [False, False, True, True]


def test_a_name_and_a_note_are_kept_in_the_runs_folder(view):
    run_id = "20261122-100000-amber-heron"
    select(view, run_id)
    press(view, view.name_button)
    assert shown(view._editor)
    view.label.value, view.note.value = "  the <b>base</b>\nline ", "r is too small\n"
    save = view._editor.children[-1].children[0]
    press(view, save)
    assert json.loads((view.folder / run_id / "about.json").read_text()) == {
        "label": "the <b>base</b> line", "note": "r is too small",
    }  # fmt: skip
    cells = view._lines[run_id]._cells.value
    assert "the &lt;b&gt;base&lt;/b&gt; line" in cells
    assert "r is too small" in view._hint.value
    assert Run.open("the <b>base</b> line", runs_dir=view.folder).id == run_id
    assert not shown(view._editor)


def test_deleting_asks_moves_to_the_trash_and_can_be_undone(view):
    run_id = "20261122-090000-quiet-otter"
    select(view, run_id)
    press(view, view.delete_button)
    assert "Delete quiet-otter?" in view._notice.value
    assert (view.folder / run_id).exists()
    press(view, view._keep)
    assert (view.folder / run_id).exists()
    assert not shown(view._confirm)
    press(view, view.delete_button)
    press(view, view._confirm)
    assert names(view) == ["amber-heron", "stray-finch"]
    assert (view.folder / ".trash" / run_id / "spec.yaml").exists()
    assert view.selected == []
    press(view, view._undo)
    assert view.error is None
    assert names(view) == ["amber-heron", "quiet-otter", "stray-finch"]
    assert (view.folder / run_id / "events.jsonl").exists()


def test_a_run_that_goes_on_is_not_deleted(view):
    run_id = "20261122-080000-stray-finch"
    events = view.folder / run_id / "events.jsonl"
    events.write_text("\n".join(events.read_text().splitlines()[:-1]) + "\n")  # without its end
    with FileLock(view.folder / run_id / ".lock"):
        view._ask(view._refresh)
        select(view, run_id)
        press(view, view.delete_button)
        assert "Still running: stray-finch" in view._notice.value
        assert not shown(view._confirm)
        view._to_delete = view.selected
        press(view, view._confirm)
        assert "Stop it before you delete it" in view._notice.value
    assert (view.folder / run_id).exists()


def test_what_goes_wrong_is_said(view):
    select(view, "20261122-100000-amber-heron")
    press(view, view.name_button)
    view.label.value = "x" * 100
    press(view, view._editor.children[-1].children[0])
    assert "The label is too long" in view._notice.value
    assert "100 characters" in view._notice.value
    (view.folder / "20261122-100000-amber-heron" / "about.json").write_text("{")
    view._ask(view._refresh)
    until(lambda: "label cannot be read" in view._notice.value)


def test_a_run_opens_with_its_charts(view):
    select(view, "20261122-080000-stray-finch")
    press(view, view.open_button)
    assert view._opened.children == (view.view.widget,)
    until(lambda: view.view.charts.outputs)
    assert shown(view.view.resume_button)
    assert shown(view.view.after.buttons)


def test_a_run_that_goes_on_moves_in_the_table(view, monkeypatch):
    monkeypatch.setattr("nbtune_widgets.runs.REFRESH_SECONDS", 0.05)
    run_id = "20261122-080000-stray-finch"
    events = view.folder / run_id / "events.jsonl"
    *lines, _ = events.read_text().splitlines()
    events.write_text("\n".join(lines[:20]) + "\n")
    with FileLock(view.folder / run_id / ".lock"):
        view._ask(view._refresh)
        until(lambda: "running" in view._lines[run_id]._cells.value)
        step = view._runs[run_id].progress().step
        assert f"{step} of 20" in view._lines[run_id]._cells.value
        with events.open("a") as file:
            file.write("\n".join(lines[20:]) + "\n")
        until(lambda: "20 of 20" in view._lines[run_id]._cells.value)


def test_hundreds_of_runs_are_shown_a_page_at_first(tmp_path):
    for index in range(30):
        replay.write_run(tmp_path, f"20261122-{100000 + index}-run-{index}", 2, seed=index)
    view = RunsView(tmp_path)
    assert len(view._rows.children) == 25
    assert view._more.description == "Show all 30"
    press(view, view._more)
    assert len(view._rows.children) == 30
    assert not shown(view._more)
    view.close()


def test_no_runs_say_how_to_make_one(tmp_path):
    view = RunsView(tmp_path / "none")
    assert "nbtune.wizard()" in view._hint.value
    assert not shown(view._table_head)
    view.close()


def test_close_gives_every_widget_back(folder):
    before = set(ipywidgets.widgets.widget._instances)
    view = RunsView(folder)
    select(view, "20261122-100000-amber-heron", "20261122-090000-quiet-otter")
    view.close()
    assert set(ipywidgets.widgets.widget._instances) == before
    assert view._thread is None


def test_a_list_of_runs_is_still_a_list(folder):
    found = runs(folder)
    assert [run.name for run in found] == ["amber-heron", "quiet-otter", "stray-finch"]
    assert found.folder == folder
    assert found[0].about.label == ""
