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
from nbtune_widgets import LiveView, _reports, charts, in_kernel
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
    step = view.run.progress().step
    assert 50 < step < 60
    assert f"step {step} of 100 · 812 tokens/s" in view.status.value
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


def buttons(view):
    """What can be pressed now."""
    found = {"Pause": view.pause_button, "Stop": view.stop_button, "Resume": view.resume_button}
    return [name for name, button in found.items() if button.layout.display is None]


def test_pause_and_resume_by_button_and_only_what_applies_is_shown(make):
    view = make(steps=400, seconds=0.005)
    view.start()
    until(lambda: view.charts.outputs)
    assert buttons(view) == ["Pause", "Stop"]
    view.pause_button.click()
    until(lambda: buttons(view) == ["Stop", "Resume"])
    at = view.run.progress().step
    assert f"paused · step {at} of 400" in view.status.value
    time.sleep(0.1)
    assert view.run.progress().step == at
    view.resume_button.click()
    until(lambda: buttons(view) == ["Pause", "Stop"])
    until(lambda: view.run.progress().step > at)
    view.pause_button.click()
    until(lambda: buttons(view) == ["Stop", "Resume"])
    view.stop_button.click()
    until(lambda: buttons(view) == ["Resume"])
    assert view.run.status == "stopped"


def test_samples_unfold_by_question_with_the_datas_answer_under_them(make):
    view = make(steps=100, begin=False)
    view._blocking = True  # this test drives
    view.run.status, view.run.written = "running", 1
    view._step()
    assert view.folds["samples"].toggle.layout.display == "none"  # nothing was asked yet
    view.run.written = len(view.run.script)
    view._step()
    assert view.folds["samples"].toggle.description == "▸ samples (3)"
    view.folds["samples"].toggle.value = True
    view._step()
    html = view.folds["samples"].content.value
    assert html.count("What does `os.path.join` do in Python?") == 1
    assert [html.count(f">step {step}<") for step in (0, 20, 40, 60, 80, 100)] == [3] * 6
    assert html.count(">data<") == 2  # the third question is a person's own
    assert "treat &lt;tabs&gt;?" in html  # what a model or a person writes is no HTML
    assert "<tabs>" not in html


def test_of_many_evaluations_the_first_the_last_and_some_between_are_shown():
    events = [replay.samples(step, step / 1000) for step in range(0, 1001, 20)]
    html = _reports.samples(events)
    steps = [step for step in range(0, 1001, 20) if f">step {step}<" in html]
    assert (len(steps), steps[0], steps[-1]) == (6, 0, 1000)


def test_an_update_is_cheap(make):
    """A few percent of a core at 1 Hz: with 1,000 steps behind it, new ones every second, and everything unfolded."""
    view = make(steps=1100, begin=False)
    view._blocking = True
    view.run.status = "running"
    for fold in view.folds.values():
        fold.toggle.value = True
    script, took = view.run.script, []
    written = next(index for index, event in enumerate(script) if event["step"] == 1000)
    for _ in range(20):
        written += 5
        view.run.written, view._pushed_at = written, 0.0
        began = time.process_time()
        view._step()
        took.append(time.process_time() - began)
    assert view.pushes == 20
    assert min(took) < 0.03  # seconds of a processor that others share; 0.012 on a quiet one, 0.02 on a busy one


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


def test_a_failure_has_a_title_a_remedy_what_is_kept_and_a_folded_traceback(make):
    view = make(steps=60, seconds=0.001, fail_at=27)
    view.pump()  # trap 1: the thread's failure must be seen
    html = view.notice.value
    assert ">Loss is not a number</b>" in html
    assert "<div>Lower the learning rate.</div>" in html
    assert "The checkpoint of step 20 is kept: Resume goes on from it." in html
    assert html.index("<details") < html.index("Traceback (most recent call last)") < html.index("</details>")
    assert "<details open" not in html
    assert "user-select:all" in html  # one click selects it, to be copied
    assert buttons(view) == ["Resume"]


def test_a_failure_before_the_first_checkpoint_says_so(make):
    view = make(steps=40, seconds=0.001, fail_at=7)
    view.pump()
    assert "No checkpoint was written yet: Resume starts from the beginning." in view.notice.value


def test_an_interruption_says_what_is_kept(make):
    view = make(steps=60, begin=False)
    view.run.status, view.run.written = "interrupted", len(view.run.script)
    view._step()
    assert "its process ended" in view.notice.value
    assert "The checkpoint of step 60 is kept" in view.notice.value


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


def test_a_card_that_was_drawn_again_keeps_its_charts_when_the_run_has_ended(make):
    """After a reload JupyterLab no longer knows the display handles of the places that are kept."""
    view = make(steps=30, seconds=0.001)
    view.kept = [Handle(), Handle()]
    view.widget._view_count = 1
    view.pump()
    assert view.charts.outputs == ()
    assert charts.PLOTLY in view.kept[0].content
    view.widget._view_count = 2
    until(lambda: view.charts.outputs)
    assert shown(view)["data"][0]["x"][-1] == 30


def test_a_card_that_was_drawn_again_gets_its_charts_again(make):
    """A page that opens while they are sent may show none, and of a paused run no others come."""
    view = make(steps=30, seconds=0.001)
    view.pump()
    pushes = view.pushes
    view.widget._view_count = 1
    view._step()
    assert view.pushes == pushes
    view.widget._view_count = 2
    until(lambda: view.pushes == pushes + 1)
    assert shown(view)["data"][0]["x"][-1] == 30


class Handle:
    """As IPython's display handle."""

    def update(self, content, raw):
        assert raw
        self.content = content


def test_the_window_says_what_it_is(make):
    view = make(steps=5, begin=False)
    assert (view.window.index, view.window.label, view.view.window) == (0, "all steps", None)


def test_log_and_settings_open_on_demand(make):
    view = make(steps=5, seconds=0.001)
    view._blocking = True
    view.run.wait()
    view._step()
    log, spec = view.folds["log"], view.folds["spec"]
    assert log.content.layout.display == spec.content.layout.display == "none"
    log.toggle.value = spec.toggle.value = True
    view._step()
    assert "step 5 train" in log.content.value
    assert "max_steps: 5" in spec.content.value


def test_a_variation_opens_the_form_with_the_runs_settings(make):
    run = replay.ReplayRun(steps=7, seconds=0.2)  # still going when the view is there
    view = LiveView(run, interval=0.02, after=True)
    assert view.after.buttons.layout.display == "none"
    view.pump()
    assert view.after.buttons.layout.display is None
    view.after.vary_button.click()
    until(lambda: view.after.opened.children, 30)
    wizard = view.after._wizard
    assert wizard.spec == run.spec
    assert wizard.fields["training.max_steps"].value == 7
    wizard.wait(120)
    view.close()


def test_what_cannot_be_opened_says_why(make):
    view = LiveView(replay.ReplayRun(steps=3, seconds=0.001), interval=0.02, after=True)
    view.pump()
    view.after.compare_button.click()  # a replayed run has no adapter
    until(lambda: "nt-error" in view.after.told.value, 60)
    view.close()


def test_close_gives_every_widget_back():
    before = set(ipywidgets.widgets.widget._instances)
    view = LiveView(replay.ReplayRun(steps=3, seconds=0.001), after=True)
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
