"""JupyterLab driven by Chromium: what a person sees and what the buttons do. Pictures go to the test's folder."""

import json
import os
import re
from pathlib import Path

import pytest

from nbtune_widgets import charts

pytestmark = [pytest.mark.browser, pytest.mark.slow]

PLOT = ".js-plotly-plot"
LIVE = "from replay import ReplayRun\nimport nbtune_widgets\nrun = ReplayRun(120, 0.1)\nview = nbtune_widgets.show(run)"
# The steps that the loss curve on the screen shows.
STEPS = f"() => Math.max(0, ...[...document.querySelectorAll('{PLOT}')].map(p => p.data?.[0]?.x.at(-1) ?? 0))"


def steps(notebook):
    return notebook.page.evaluate(STEPS)


def await_text(notebook, text, seconds=60):
    notebook.page.wait_for_function("t => document.body.innerText.includes(t)", arg=text, timeout=seconds * 1000)


def await_worker(notebook, seconds=240):
    """Until the wizard's status line has been empty for half a second."""
    notebook.page.wait_for_timeout(500)
    busy = "() => document.querySelectorAll('.nbtune .nt-working').length == 0"
    notebook.page.wait_for_function(busy, timeout=seconds * 1000)
    notebook.page.wait_for_timeout(500)


def await_one_plot(notebook):
    """The live charts or those that are kept; while one makes place for the other there may be two."""
    one = f"() => document.querySelectorAll('{PLOT}').length == 1"
    notebook.page.wait_for_function(one, timeout=20_000)


def test_live_view_moves_stops_resumes_and_stays(open_notebook, tmp_path):
    notebook = open_notebook(LIVE, "6 * 7")
    errors = []
    notebook.page.on("pageerror", lambda error: errors.append(str(error)))
    notebook.run_to_end(0)
    notebook.page.wait_for_selector(PLOT)
    before = steps(notebook)
    notebook.run_to_end(1)
    assert "42" in notebook.text(1)  # other cells run meanwhile
    notebook.page.wait_for_function(f"({STEPS})() > {before}", timeout=20_000)
    await_one_plot(notebook)
    notebook.shot(tmp_path / "live.png")

    notebook.button("Stop").click()
    notebook.button("Resume").wait_for()
    await_text(notebook, "stopped · step")
    notebook.page.wait_for_timeout(1000)
    at = steps(notebook)
    assert 0 < at < 120
    await_one_plot(notebook)  # the plain one, the live one is folded away
    notebook.shot(tmp_path / "stopped.png")

    notebook.button("Resume").click()
    notebook.page.wait_for_function(f"({STEPS})() > {at}", timeout=20_000)
    await_one_plot(notebook)
    await_text(notebook, "finished · step 120 of 120")
    notebook.page.wait_for_function(f"({STEPS})() == 120", timeout=20_000)
    await_one_plot(notebook)
    notebook.shot(tmp_path / "finished.png")
    assert errors == []

    saved = notebook.save()
    outputs = [output.get("data", {}) for output in saved["cells"][0]["outputs"]]
    drawn = [data for data in outputs if charts.PLOTLY in data]
    assert len(drawn) == 1
    assert drawn[0][charts.PLOTLY]["data"][0]["x"][-1] == 120
    assert "image/svg+xml" in drawn[0]
    assert any("Held-out loss" in "".join(data.get("text/html", "")) for data in outputs)
    assert len(json.dumps(saved)) < 1_000_000


def test_view_controls_act_on_a_live_and_on_a_finished_run(open_notebook):
    notebook = open_notebook(LIVE.replace("120, 0.1", "60, 0.05"), name="controls.ipynb")
    notebook.run_to_end(0)
    notebook.page.wait_for_selector(PLOT)
    # No plot for a moment while one goes and the next comes.
    kind = f"() => document.querySelector('{PLOT}')?.layout?.yaxis?.type ?? 'none'"
    notebook.page.get_by_label("log scale").check()
    notebook.page.wait_for_function(f"({kind})() == 'log'", timeout=10_000)
    await_text(notebook, "finished · step 60 of 60")
    notebook.page.wait_for_timeout(1500)
    notebook.page.get_by_label("log scale").uncheck()
    notebook.page.wait_for_function(f"({kind})() == 'linear'", timeout=10_000)
    notebook.page.get_by_label("window").select_option("last 50")
    first = f"document.querySelector('{PLOT}')?.layout?.xaxis?.range[0]"
    notebook.page.wait_for_function(f"{first} == 10", timeout=10_000)
    notebook.page.get_by_role("button", name="▸ log").click()
    await_text(notebook, "step 60 train")


def test_an_awaited_cell_hears_its_stop_button(open_notebook):
    """ipykernel 7.4 handles a click while a cell awaits; a cell that blocks would hear it when it is over."""
    cell = "from replay import ReplayRun\nimport nbtune_widgets\nrun = ReplayRun(400, 0.1)\n"
    notebook = open_notebook(cell + "await nbtune_widgets.watch_async(run)\nrun.status", name="awaited.ipynb")
    notebook.run(0)
    notebook.page.wait_for_selector(PLOT)
    notebook.button("Stop").click()
    notebook.await_prompt(0, 20)
    assert "'stopped'" in notebook.text(0)


def test_the_result_is_seen_without_a_kernel(open_notebook, lab, tmp_path):
    notebook = open_notebook(LIVE.replace("120, 0.1", "30, 0.02"), name="kept.ipynb")
    notebook.run_to_end(0)
    await_text(notebook, "finished · step 30 of 30")
    notebook.page.wait_for_timeout(1500)
    notebook.save()
    notebook.close()
    lab.delete_kernels()
    again = open_notebook(name="kept.ipynb")  # a new kernel, that knows nothing of it
    await_text(again, "Held-out loss")
    # Before a first click JupyterLab shows the picture that it saved with the figure.
    picture = again.page.locator(f".jp-OutputArea-output img, {PLOT}").first
    picture.wait_for()
    assert picture.bounding_box()["height"] > 200
    again.shot(tmp_path / "kept.png")


@pytest.mark.parametrize("lab", ["JupyterLab Dark"], indirect=True)
def test_dark_theme_and_900_pixels(open_notebook, tmp_path):
    notebook = open_notebook(LIVE, name="dark.ipynb", width=900)
    notebook.run_to_end(0)
    notebook.page.wait_for_selector(PLOT)
    notebook.shot(tmp_path / "dark.png")
    style = "s => { const c = getComputedStyle(document.querySelector(s)); return [c.color, c.backgroundColor] }"
    for selector in (".nbtune select", ".nbtune .nt-name", ".nbtune button"):
        color, background = notebook.page.evaluate(style, selector)
        assert color != background
        assert min(int(part) for part in re.findall(r"\d+", color)[:3]) > 120  # light on dark
    card = notebook.page.locator(".nbtune.nt-card").bounding_box()
    for part in notebook.page.locator(".nbtune.nt-card .widget-hbox > *").all():
        box = part.bounding_box()
        assert box is None or box["x"] + box["width"] <= card["x"] + card["width"] + 1  # nothing sticks out
    titles = [title.bounding_box() for title in notebook.page.locator(f"{PLOT} .annotation").all()]
    for one in titles:
        for other in titles:
            same_row = one is not other and abs(one["y"] - other["y"]) < 8 and one["x"] < other["x"]
            assert not same_row or one["x"] + one["width"] <= other["x"]


def test_wizard_from_an_empty_notebook_to_the_chat(open_notebook, lab, tmp_path):
    """The real thing: a model, a file, modules by mouse, Start, charts that move while other cells run, Stop, Resume,
    another page, Compare, a variation.
    """
    rows = [{"instruction": f"What is {n} plus {n}?", "input": "", "output": f"It is {2 * n}."} for n in range(999)]
    samples = os.environ.get("NBTUNE_SAMPLE_DATA")
    source = Path(samples) / "alpaca_en_demo.json" if samples else None
    data = source.read_bytes() if source is not None else json.dumps(rows).encode()
    (lab.folder / "alpaca_en_demo.json").write_bytes(data)
    wizard = "import nbtune as nt\nwizard = nt.wizard()"
    notebook = open_notebook(wizard, "6 * 7", "wizard.error", "wizard.run.summary()['status']", name="wizard.ipynb")
    page = notebook.page
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))

    def step(name):
        page.locator("button.nt-step", has_text=name).click()

    def fill(label, value):
        page.get_by_label(label, exact=True).fill(value)
        page.keyboard.press("Tab")

    notebook.run_to_end(0)
    await_worker(notebook)
    await_text(notebook, "134,515,008")
    notebook.shot(tmp_path / "model.png")
    step("Data")
    notebook.button("alpaca_en_demo.json").click(timeout=60_000)
    await_text(notebook, "999 rows · 9", 120)
    await_worker(notebook)
    notebook.shot(tmp_path / "data.png")
    step("Method")
    await_worker(notebook)
    notebook.button("attention").click()
    await_worker(notebook)
    await_text(notebook, "120 of 210 modules · 921,600 trainable parameters")
    page.locator("[role=rowheader] button", has_text="o_proj").click()
    await_worker(notebook)
    await_text(notebook, "90 of 210 modules")
    notebook.shot(tmp_path / "method.png")
    step("Training")
    fill("Steps", "0")
    await_worker(notebook)
    await_text(notebook, "training.max_steps is 0")
    for label, value in [("Steps", "60"), ("Max length", "64"), ("Eval steps", "0"), ("Batch size", "1")]:
        fill(label, value)
    await_worker(notebook)
    notebook.shot(tmp_path / "training.png")
    step("Review")
    await_worker(notebook)
    await_text(notebook, "Nothing stands in the way")
    notebook.shot(tmp_path / "review.png")

    notebook.button("Start").click()
    page.wait_for_selector(PLOT, timeout=180_000)
    before = steps(notebook)
    notebook.run_to_end(1)
    assert "42" in notebook.text(1)
    page.wait_for_function(f"({STEPS})() > {before}", timeout=60_000)
    notebook.shot(tmp_path / "running.png")
    notebook.button("Stop").click()
    notebook.button("Resume").wait_for(timeout=60_000)
    page.wait_for_timeout(1500)
    at = steps(notebook)
    assert at < 60
    notebook.button("Resume").click()
    page.wait_for_function(f"({STEPS})() > {at}", timeout=120_000)
    notebook.save()
    page.reload()  # the kernel trains on
    page.wait_for_selector(PLOT, timeout=60_000)
    page.wait_for_function(f"({STEPS})() > {at + 1}", timeout=60_000)
    notebook.shot(tmp_path / "reloaded.png")
    notebook.button("Stop").click()
    notebook.button("Compare").click(timeout=120_000)
    link = page.locator(".nt-info a")
    link.wait_for(timeout=120_000)
    assert link.get_attribute("href").startswith("http://127.0.0.1:")
    notebook.shot(tmp_path / "compare.png")
    notebook.button("Start a variation").click()
    page.locator(".nt-map").wait_for()
    notebook.shot(tmp_path / "variation.png")
    notebook.run_to_end(3)
    assert "stopped" in notebook.text(3)
    notebook.run_to_end(2)
    assert "None" in notebook.text(2) or not notebook.text(2).strip()
    assert errors == []
    saved = notebook.save()
    assert len(json.dumps(saved)) < 1_000_000
