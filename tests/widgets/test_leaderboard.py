"""The leaderboard in plain Python: what it shows of a sweep, who writes, what its buttons do."""

import json
import sys
import threading
import time
from pathlib import Path

import ipywidgets
import plotly.graph_objects as go
import pytest
import recorded

import nbtune as nt
from nbtune.errors import SweepError
from nbtune.sweep.importance import explained, importance
from nbtune.sweep.trial import Trial
from nbtune_widgets import Leaderboard, _trialtable, charts
from nbtune_widgets._adding import compact, read

sys.path.append(str(Path(__file__).parents[1] / "sweep"))
from toy import write_toy

PATIENCE = 240  # seconds, on a machine that is busy with other things


def until(condition, seconds=PATIENCE):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def make(tmp_path):
    """A board of a recorded sweep that another holder is at; this test drives it."""
    opened = []

    def board(**settings):
        sweep = recorded.record(tmp_path / "sweep-1", **settings)
        opened.append((Leaderboard(sweep), recorded.hold(sweep)))
        opened[-1][0]._blocking = True
        opened[-1][0]._step()
        return opened[-1]

    yield board
    for made, lock in opened:
        made.close()
        lock.release()


def names(board):
    return [one.name for one in board.facts]


def html(board, number):
    return board.rows[number]._cells.value


def figure(board):
    return board.charts.outputs[0]["data"][charts.PLOTLY]


def told(trace):
    return trace["hovertemplate"].split("<br>")[0]


def test_the_headline_and_the_rows(make):
    board, _ = make()
    assert ">7 of 12</b><span>trials done · 2 running · 1 waiting · 1 went wrong · 1 refused<" in board.tiles.value
    assert ">2.335</b><span>best so far: 002, r 8, learning_rate 0.0003, method loha<" in board.tiles.value
    assert ">≈ 1:" in board.tiles.value
    assert names(board) == "002 004 006 007 003 005 001 009 010 008 011 012".split()
    assert "★" in html(board, 2)
    assert "★" not in html(board, 4)
    assert "23/60" in html(board, 9)
    assert 'style="width:38%"' in html(board, 9)
    assert "the same as 3" in html(board, 12)
    assert 7.5 / 12 < board.bar.value < 10.5 / 12
    assert "eval_loss_after" in board.head.value


def test_an_error_is_there_on_demand_escaped_with_a_link_to_the_notebook(make, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    board, _ = make()
    row = html(board, 8)
    assert "<summary>RunError: Loss is not a number</summary>" in row
    assert "<details open" not in row
    assert "&lt;b&gt;step 23&lt;/b&gt; of 60" in row
    assert row.count('href="sweep-1/008.ipynb"') == 2
    assert "href" not in html(board, 11)  # it has none yet


def test_a_look_at_nothing_new_sends_next_to_nothing(make, monkeypatch):
    board, _ = make()
    sent = []
    monkeypatch.setattr(ipywidgets.Widget, "send_state", lambda self, key=None: sent.append((type(self).__name__, key)))
    for _ in range(3):
        board._step()
    assert all(kind == "HTML" for kind, _ in sent)  # the clocks of the two that run, the time left
    assert len(sent) <= 3 * 3


def test_the_table_changes_while_trials_run(make):
    board, _ = make()
    writes = []
    for number, row in board.rows.items():
        row._cells.observe(lambda _, number=number: writes.append(number), names="value")
    run = board.sweep.trial(9).run_path
    recorded.write_events(run, [{"type": "train", "time": time.time(), "step": 24, "loss": 2.5, "tokens": 800,
                                 "tokens_per_second": 800.0, "peak_memory_bytes": 1}])  # fmt: skip
    board._step()
    assert "24/60" in html(board, 9)
    assert set(writes) <= {9, 10}  # what ended is not written again


def test_every_trial_has_a_curve_and_the_best_stands_out(make):
    board, _ = make()
    made = figure(board)
    go.Figure({key: made[key] for key in ("data", "layout")})  # raises where Plotly would not take it
    held_out = [trace for trace in made["data"] if trace["xaxis"] == "x"]
    assert len(held_out) == 10
    assert told(held_out[-1]).startswith("002 · r 8, learning_rate 0.0003, method loha")
    assert held_out[-1]["line"] == {"color": "#d08a1a", "width": 3}
    running = [told(trace)[:3] for trace in held_out if trace["line"]["color"] == charts.BLUE]
    assert sorted(running) == ["009", "010"]


def test_parallel_coordinates_and_importance(make):
    board, _ = make()
    made = figure(board)
    lines = [trace for trace in made["data"] if trace["xaxis"] == "x8"]
    assert len(lines) == 7
    assert lines[-1]["hovertemplate"].startswith("<b>002</b><br>r 8<br>learning_rate 0.0003<br>method loha<br>eval")
    assert lines[-1]["y"][-1] == 1.0  # the best is above
    assert lines[0]["y"][-1] == 0.0
    (bars,) = [trace for trace in made["data"] if trace["type"] == "bar"]
    assert bars["customdata"][0] == "learning_rate"
    assert "7 trials tell little" in board.meaning.value
    svg = board.charts.outputs[0]["data"]["image/svg+xml"]
    assert svg.count("<polyline") == 10 + 10 + 7
    assert ">learning_rate</text>" in svg


def test_the_log_scale_and_freezing(make):
    board, _ = make()
    board.log_scale.value = True
    board._step()
    assert figure(board)["layout"]["yaxis"]["type"] == "log"
    board.freeze.value = True
    board._step()
    pushes = board.pushes
    run = board.sweep.trial(9).run_path
    recorded.write_events(run, [{"type": "eval", "time": time.time(), "step": 24, "eval_loss": 2.5}])
    board._pushed_at = 0.0
    board._step()
    assert board.pushes == pushes


def test_an_update_is_cheap(tmp_path):
    """A few percent of a core at 1 Hz, with 60 trials that ended, 4 that run, and a new step of each every second."""
    space = {"r": [2, 4, 8, 16], "learning_rate": [1e-4, 2e-4, 3e-4, 1e-3, 3e-3], "method": ["lora", "loha", "miss"]}
    sweep = recorded.record(tmp_path / "many", ended=55, running=4, space=space, limit=60)
    lock = recorded.hold(sweep)
    board = Leaderboard(sweep)
    board._blocking, board._all = True, True
    board._step()
    took = []
    for step in range(24, 44):
        for number in (56, 57, 58, 59):
            event = {"type": "train", "time": time.time(), "step": step, "loss": 2.5 + step / 100, "tokens": 800,
                     "tokens_per_second": 800.0, "peak_memory_bytes": 1}  # fmt: skip
            recorded.write_events(board.sweep.trial(number).run_path, [event])
        board._pushed_at = 0.0
        began = time.process_time()
        board._step()
        took.append(time.process_time() - began)
    assert board.pushes == 21
    assert min(took) < 0.08  # seconds of a processor that others share
    assert len(json.dumps(board.charts.outputs)) < 500_000
    board.close()
    lock.release()


def test_one_thread_writes(make, monkeypatch):
    writers = set()
    send = ipywidgets.Widget.send_state
    monkeypatch.setattr(
        ipywidgets.Widget, "send_state", lambda self, key=None: (writers.add(threading.get_ident()), send(self, key))
    )
    board, _ = make()
    board._blocking = False
    board.start()
    time.sleep(0.3)
    writers.clear()
    for button in (board.add_button, board.adding.add_button, board.stop_button, board.no_button):
        threading.Thread(target=button.click).start()
    until(lambda: board.adding.told.value)
    board._take_over()
    assert len(writers) == 1
    assert threading.get_ident() not in writers


def test_what_loses_something_is_asked_first(make):
    board, _ = make()
    stopped = []
    board.sweep.stop = lambda trial=None: stopped.append(trial and trial.number)
    board.rows[9].stop_button.click()
    board._step()
    assert stopped == []
    assert "Stop trial 009?" in board._notice.value
    assert "Its adapter is kept" in board._notice.value
    board.no_button.click()
    board._step()
    assert board._notice.value == ""
    board.rows[9].stop_button.click()
    board.yes_button.click()
    board._step()
    assert stopped == [9]
    board.stop_button.click()
    board.yes_button.click()
    board._step()
    assert stopped == [9, None]
    assert board.rows[2].stop_button.layout.visibility == "hidden"


def test_trials_are_added_by_values_and_at_random(make):
    board, _ = make()
    added = []
    board.sweep.add = lambda **point: added.append(point)
    board.add_button.click()
    board._step()
    fields = board.adding.fields
    assert {name: field.value for name, field in fields.items()} == {
        "r": "8", "learning_rate": "0.0003", "method": "loha",
    }  # fmt: skip
    board.adding.add_button.click()
    board._step()
    assert "Nothing new to try" in board.adding.told.value
    fields["r"].value, fields["learning_rate"].value = "8, 32", "2e-4 .. 4e-4 log 2"
    board.adding.add_button.click()
    board._step()
    assert added == [{"r": r, "learning_rate": rate, "method": "loha"} for r in (8, 32) for rate in (2e-4, 4e-4)]
    assert "4 trials added" in board._notice.value
    tried = [trial.params for trial in board.sweep.trials]
    added.clear()
    board.add_button.click()
    board.adding.count.value = 3
    board.adding.random_button.click()
    board._step()
    assert len(added) == 3
    assert all(point not in tried for point in added)
    board.add_button.click()
    board._step()
    for wrong, reason in (("", "r has no value"), ("8, [", "cannot be read"), ("9..3", "is empty"), ("1..9", "an n")):
        fields["r"].value = wrong
        board.adding.add_button.click()
        board._step()
        assert reason in board.adding.told.value, wrong


def test_the_arena_opens_on_the_best_three(make, monkeypatch):
    board, _ = make()
    asked = []

    class Opened:
        url = "http://127.0.0.1:7860"

    monkeypatch.setattr("nbtune.compare.arena.arena", lambda *columns, **_: asked.extend(columns) or Opened)
    board.arena_button.click()
    board._step()
    board._worker.wait(60)
    assert [getattr(column, "id", column) for column in asked] == ["base", "002-run", "004-run", "006-run"]
    assert 'href="http://127.0.0.1:7860"' in board.told.value


def test_at_its_end_a_plain_summary_is_kept(make):
    board, lock = make()
    shown = []

    class Place:
        def update(self, data, raw):
            shown.append((self, data))

    board.keep_in([Place(), Place()])
    shown.clear()
    recorded.conclude(board.sweep, lock)
    assert board._step()
    figure, table = board.kept
    last = dict(shown)
    assert last[figure][charts.PLOTLY]["layout"]["height"] == 570
    assert last[figure]["image/svg+xml"].startswith("<svg")
    kept = last[table]["text/html"]
    assert kept.count("<tr") == 13
    assert "class=" not in kept.replace('class="nt-mark"', "").replace('class="nt-help"', "")  # no style block there
    assert "10 finished, 1 failed, 1 refused" in kept
    assert "* 002 finished: r=8, learning_rate=0.0003, method=loha; eval_loss_after 2.335" in last[table]["text/plain"]
    assert board.charts.outputs == ()
    assert board._table.layout.display == "none"
    assert "finished" in board.header.value
    assert len(json.dumps(list(last.values()))) < 200_000


def test_a_sweep_that_was_not_started_shows_what_it_is_going_to_do(tmp_path):
    toy = write_toy(tmp_path / "toy.ipynb")
    sweep = nt.sweep(toy, {"loss": [1.0, 2.0]}, out=tmp_path / "s", tracking=nt.TrackingSpec(mlflow=False), start=False)
    board = Leaderboard(sweep)
    assert names(board) == ["001", "002"]
    assert board.start_button.description == "Start"
    assert board.start_button.layout.display is None
    assert board.stop_button.layout.display == "none"
    board.close()


def test_closing_gives_the_widgets_back(tmp_path):
    sweep = recorded.record(tmp_path / "sweep-1")
    before = set(ipywidgets.widgets.widget._instances)
    board = Leaderboard(sweep)
    board._blocking = True
    board.add_button.click()
    board._step()
    board.close()
    assert set(ipywidgets.widgets.widget._instances) == before


def test_a_failure_of_the_view_is_kept_and_shown(make, monkeypatch):
    board, _ = make()
    board._blocking = False
    monkeypatch.setattr(board, "_read", lambda: 1 / 0)
    board.start()._thread.join(10)
    assert board.error == "ZeroDivisionError: division by zero"
    assert "the sweep itself is not touched" in board._notice.value


def test_real_trials_are_watched_stopped_and_added(tmp_path):
    """Processes of their own: one goes on until its button is pressed, one is added while the other runs."""
    toy = write_toy(tmp_path / "toy.ipynb")
    gate = tmp_path / "open"
    params = {"steps": 400, "wait_for": str(gate)}
    sweep = nt.sweep(
        toy, {"loss": [2.0]}, params=params, out=tmp_path / "s", tracking=nt.TrackingSpec(mlflow=False)
    )  # fmt: skip
    board = Leaderboard(sweep, interval=0.1).start()
    until(lambda: board.charts.outputs)
    until(lambda: "1/400" in html(board, 1))
    board.add_button.click()
    until(lambda: board.adding.widget.layout.display is None)
    board.adding.fields["loss"].value = "1.0"
    board.adding.add_button.click()
    board.rows[1].stop_button.click()
    until(lambda: "Stop trial 001?" in board._notice.value)
    board.yes_button.click()
    gate.touch()
    until(lambda: names(board)[:1] == ["001"] and board.facts[0].state == "stopped")
    until(lambda: board._notice.value == "")  # it is no longer being stopped
    until(lambda: 2 in board.rows and "/400" in html(board, 2))
    sweep.stop()
    sweep.wait(PATIENCE)
    until(lambda: board.best is not None and board.best.number == 2)
    assert [trial.state for trial in sweep.trials] == ["stopped", "stopped"]
    board.close()


def test_importance_is_the_share_that_a_setting_explains():
    def trial(number, value, **params):
        return Trial(Path(), number, params, "finished", metrics={"m": value})

    trials = [trial(n, 10 * a + b, a=a, b=b) for n, (a, b) in enumerate((a, b) for a in (1, 2) for b in (1, 2, 3))]
    shares = {one.name: one.share for one in importance(trials, "m")}
    assert list(shares) == ["a", "b"]
    # by hand: total 154 over 5, within a 4 over 4, within b 150 over 3
    assert shares["a"] == pytest.approx(1 - (4 / 4) / (154 / 5))
    assert shares["b"] == 0.0
    assert explained([[1.0, 1.0], [1.0]]) == 0.0
    assert importance(trials[:3], "m") == []
    drawn = [trial(n, n**2, rate=n / 7) for n in range(9)]  # nine numbers, none twice: low, middle, high
    (only,) = importance(drawn, "m")
    assert 0.8 < only.share < 1


def test_what_is_typed_is_read_as_on_a_command_line():
    assert read("r", "4, 8,16") == [4, 8, 16]
    assert read("rate", "1e-5..1e-3 log 3") == nt.Range(1e-5, 1e-3, n=3, log=True)
    assert read("rate", "1e-5 .. 1e-3 : log") == nt.Range(1e-5, 1e-3, log=True)
    assert read("targets", "[q_proj], [q_proj, v_proj]") == [["q_proj"], ["q_proj", "v_proj"]]
    assert compact(" 2..64 log 6 ") == "2..64:log:6"
    with pytest.raises(SweepError, match="no value"):
        read("r", "  ")


def test_the_time_left_follows_from_trials_that_ended():
    def fact(number, state, **known):
        return _trialtable.Facts(number, state, {}, **known)

    ended = fact(1, "finished", seconds=100.0, predicted_seconds=50.0)
    waiting = fact(2, "waiting", predicted_seconds=30.0)
    assert _trialtable.left([ended, waiting], 1, 0) == pytest.approx(60.0)
    running = fact(3, "running", seconds=10.0, left_seconds=80.0, predicted_seconds=50.0)
    # the two took 190 s where 100 were planned, 95 each
    assert _trialtable.left([ended, waiting, running], 2, 0) == pytest.approx(80.0)  # the longest of two at a time
    assert _trialtable.left([ended, waiting, running], 1, 2) == pytest.approx(80 + 1.9 * 30 + 2 * 95)
    assert _trialtable.left([fact(1, "running", seconds=5.0, left_seconds=7.0)], 1, 0) == pytest.approx(7.0)
    assert _trialtable.left([fact(1, "waiting")], 1, 0) is None
