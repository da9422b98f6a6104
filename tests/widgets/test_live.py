"""The live view in plain Python: what it shows, who writes, what its buttons do."""

import asyncio
import io
import threading
import time

import ipywidgets
import pytest
import replay
from rich.console import Console

from nbtune.errors import RunError
from nbtune_widgets import LiveView, charts, in_kernel
from nbtune_widgets.terminal import TerminalView


@pytest.fixture
def make():
    """A view of a replayed run, closed after the test."""
    views = []

    def view(**settings):
        views.append(LiveView(replay.ReplayRun(**settings), interval=0.02))
        return views[-1]

    yield view
    for made in views:
        made.run.stop()
        made.close()


def until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def shown(view):
    return view.charts.outputs[0]["data"][charts.PLOTLY]


def test_pump_draws_until_the_end(make):
    view = make(steps=40, seconds=0.005)
    view.pump()
    assert view.run.status == "finished"
    assert view.bar.value == 1.0
    assert "finished · step 40 of 40" in view.status.value
    assert len(shown(view)["data"][0]["x"]) == 40
    assert view.stop_button.layout.display == view.resume_button.layout.display == "none"


def test_progress_line_says_step_speed_and_time_left(make):
    view = make(steps=100, begin=False)
    view.run.status, view.run.written = "running", 60
    view._step()
    assert "step 56 of 100 · 812 tokens/s" in view.status.value
    assert "left" in view.status.value
    view.run.written = 1
    view._step()
    assert "loading the model" in view.status.value


def test_stop_and_resume_by_button_from_the_updater_thread(make):
    view = make(steps=400, seconds=0.005)
    view.start()
    until(lambda: view.charts.outputs)
    view.stop_button.click()
    until(lambda: view.run.status == "stopped")
    until(lambda: view.resume_button.layout.display is None)
    at = view.run.progress().step
    assert 0 < at < 400
    view.resume_button.click()
    until(lambda: view.run.progress().step > at + 5)
    until(lambda: view.stop_button.layout.display is None)


def test_async_driver_lets_other_tasks_run(make):
    view = make(steps=400, seconds=0.01)

    async def cell():
        async def press():
            await asyncio.sleep(0.3)
            view.stop_button.click()

        await asyncio.gather(view.pump_async(), press())

    asyncio.run(cell())
    assert view.run.status == "stopped"


def test_after_a_pump_a_thread_takes_over_for_the_buttons(make):
    view = make(steps=200, seconds=0.002)
    view.run.stop()
    view.pump()
    assert view.run.status == "stopped"
    view.resume_button.click()
    until(lambda: view.run.status == "finished")


def test_an_interrupt_of_a_pump_stops_the_run(make, monkeypatch):
    view = make(steps=400, seconds=0.005)
    waits = iter([True])

    def interrupted(seconds):
        if next(waits, False):
            raise KeyboardInterrupt
        time.sleep(0.01)

    monkeypatch.setattr(view._wake, "wait", interrupted)
    view.pump()
    assert view.run.status == "stopped"


def test_a_failure_is_said_in_plain_words(make):
    view = make(steps=40, seconds=0.005, fail_at=7)
    view.pump()  # trap 1: the thread's failure must be seen
    assert "The run failed: Loss is not a number" in view.notice.value
    assert "Lower the learning rate" in view.notice.value
    assert view.resume_button.layout.display is None


def test_a_refused_resume_is_said(make, monkeypatch):
    view = make(steps=40, begin=False)
    view.run.status = "interrupted"

    def refuse():
        raise RunError("amber-heron is running in another process", "", "Stop it there.")

    monkeypatch.setattr(view.run, "resume", refuse)
    view._blocking = True
    view.resume_button.click()
    view._step()
    assert "running in another process" in view.notice.value


def test_a_failure_of_the_view_is_kept_and_shown(make, monkeypatch):
    view = make(steps=40, begin=False)
    view.run.status = "running"
    monkeypatch.setattr(view.run, "events", lambda: 1 / 0)
    view.start()._thread.join(5)
    assert view.error == "ZeroDivisionError: division by zero"
    assert "the run itself is not touched" in view.notice.value


def test_one_thread_writes(make, monkeypatch):
    """Traps 6 and 7: a callback, on whatever thread it comes, must not write to a widget."""
    writers = set()
    send = ipywidgets.Widget.send_state
    monkeypatch.setattr(
        ipywidgets.Widget, "send_state", lambda self, key=None: (writers.add(threading.get_ident()), send(self, key))
    )
    view = make(steps=300, seconds=0.005)
    view.start()
    until(lambda: view.charts.outputs)
    writers.clear()
    foreign = threading.Thread(target=lambda: [view.stop_button.click(), view.resume_button.click()])
    foreign.start()
    foreign.join()
    until(lambda: view.run.status != "running")
    assert writers == {view._thread.ident}


def test_pushes_come_with_new_data_only(make):
    view = make(steps=30, begin=False)
    view.run.status, view.run.written = "running", 20
    for _ in range(5):
        view._step()
    assert view.pushes == 1
    view.run.written = 25
    view._step()
    assert view.pushes == 1  # within a second of the last
    view._pushed_at -= 2
    view._step()
    assert view.pushes == 2


def test_view_controls(make):
    view = make(steps=100, begin=False)
    view._blocking = True  # this test drives
    view.run.status, view.run.written = "running", 100
    view._step()
    view.window.value, view.log_scale.value, view.smoothing.value = 50, True, 0.0
    view._step()
    drawn = shown(view)
    assert drawn["layout"]["yaxis"]["type"] == "log"
    assert drawn["layout"]["xaxis"]["range"][0] > 0
    assert "smoothed" not in {trace["name"] for trace in drawn["data"]}
    pushes, view.freeze.value, view.run.written = view.pushes, True, 102
    view._pushed_at = 0
    view._step()
    assert view.pushes == pushes
    view.freeze.value = False
    view._step()
    assert view.pushes == pushes + 1


def test_the_window_says_what_it_is(make):
    view = make(steps=5, begin=False)
    assert (view.window.index, view.window.label, view.view.window) == (0, "all steps", None)


def test_log_and_settings_open_on_demand(make):
    view = make(steps=5, seconds=0.001)
    view._blocking = True
    view.run.wait()
    view._step()
    assert view.log.layout.display == view.settings.layout.display == "none"
    view.log_toggle.value = view.spec_toggle.value = True
    view._step()
    assert "step 5 train" in view.log.value
    assert "max_steps: 5" in view.settings.value


def test_close_gives_every_widget_back():
    before = set(ipywidgets.widgets.widget._instances)
    view = LiveView(replay.ReplayRun(steps=3, seconds=0.001))
    view.start()
    view.close()
    assert set(ipywidgets.widgets.widget._instances) == before
    assert view._thread is None


def test_core_widgets_only():
    """Trap 3, and VS Code and Colab: no FigureWidget, nothing that needs a front-end extension of its own."""
    view = LiveView(replay.ReplayRun(steps=3, begin=False))
    modules = {widget._model_module for widget in ipywidgets.widgets.widget._instances.values()}
    assert modules <= {"@jupyter-widgets/base", "@jupyter-widgets/controls", "@jupyter-widgets/output"}
    view.close()


def test_terminal():
    text = io.StringIO()
    view = TerminalView(replay.ReplayRun(steps=20, seconds=0.002), 0.02, Console(file=text, width=120))
    view.pump()
    assert "Held-out loss" in text.getvalue()
    assert "2,949,120 parameters" in text.getvalue()
    assert not in_kernel()
