"""A sweep in JupyterLab, driven by Chromium: trials run, are stopped and added; the wizard starts another."""

import json
import os
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import expect

pytestmark = [pytest.mark.browser, pytest.mark.slow]

PLOT = ".js-plotly-plot"
SHOTS = os.environ.get("NBTUNE_SHOTS")  # a folder to keep the pictures in
TOYS = Path(__file__).parents[1] / "sweep"
PATIENCE = 240  # seconds
SWEEP = f"""
import sys
from pathlib import Path
import nbtune as nt
sys.path.append({str(TOYS)!r})
from toy import write_toy
toy = write_toy(Path("toy.ipynb"))
nt.sweep(toy, {{"loss": [2.5, 1.5], "steps": [20000]}}, jobs=2, tracking=nt.TrackingSpec(mlflow=False))
"""
STEP = "n => Number(document.querySelectorAll('.nt-trial')[n]?.innerText.match(/(\\d+)\\/20000/)?.[1] ?? 0)"
STICKING_OUT = """() => {
  const card = document.querySelector('.nbtune.nt-card').getBoundingClientRect();
  return [...document.querySelectorAll('.nbtune.nt-card *')].filter(node => {
    const box = node.getBoundingClientRect();
    return box.width && box.right > card.right + 1 && !node.closest('pre, style');
  }).map(node => node.className || node.tagName);
}"""


def await_text(notebook, text, seconds=PATIENCE):
    notebook.page.wait_for_function("t => document.body.innerText.includes(t)", arg=text, timeout=seconds * 1000)


def shot(notebook, path: Path, name: str) -> None:
    if SHOTS:
        notebook.page.wait_for_timeout(1500)
    notebook.shot(path / f"{name}.png")
    if SHOTS:
        shutil.copy(path / f"{name}.png", Path(SHOTS) / f"{name}.png")


def row(notebook, trial):
    return notebook.page.locator(f".nt-trial:has(a:text-is('{trial}'))")


def confirm_stop_all(page):
    both = page.locator(".nt-card button:visible", has_text="Stop all")
    expect(both).to_have_count(2, timeout=PATIENCE * 1000)  # the answer's name may come after the question
    both.last.click()


def test_trials_run_are_stopped_and_added_and_a_summary_stays(open_notebook, tmp_path):
    notebook = open_notebook(SWEEP, name="sweep.ipynb", width=900, height=1400)
    page = notebook.page
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    notebook.run_to_end(0)
    await_text(notebook, "2 running")
    page.wait_for_selector(PLOT, timeout=PATIENCE * 1000)
    page.wait_for_function(f"({STEP})(0) > 2 && ({STEP})(1) > 2", timeout=PATIENCE * 1000)
    before = page.evaluate(STEP, 0)
    page.wait_for_function(f"({STEP})(0) > {before} + 10", timeout=PATIENCE * 1000)  # the table changes
    curves = page.evaluate(f"document.querySelector('{PLOT}').data.map(trace => trace.name)")
    assert sorted(curves) == 2 * ["001 · loss 2.5, steps 20000"] + 2 * ["002 · loss 1.5, steps 20000"]
    assert page.evaluate(STICKING_OUT) == []
    shot(notebook, tmp_path, "board-live")

    page.get_by_title("Stop trial 001").click()
    await_text(notebook, "Stop trial 001?")
    shot(notebook, tmp_path, "board-stop")
    notebook.button("Stop 001").click()
    await_text(notebook, "1 of 2")
    row(notebook, "001").filter(has_text="stopped").wait_for(timeout=PATIENCE * 1000)

    notebook.button("Add trials").click()
    page.get_by_label("loss", exact=True).fill("0.5")
    page.get_by_label("steps", exact=True).fill("10")
    page.keyboard.press("Tab")
    shot(notebook, tmp_path, "board-add")
    notebook.button("Add these").click()
    row(notebook, "003").filter(has_text="finished").wait_for(timeout=PATIENCE * 1000)
    expect(page.locator(".nt-trial").first).to_contain_text("003", timeout=PATIENCE * 1000)  # it is the best
    await_text(notebook, "best so far: 003, loss 0.5, steps 10")
    with page.context.expect_page() as opened:
        row(notebook, "003").get_by_role("link").click()
    assert "/tree/sweeps/toy-" in opened.value.url
    assert opened.value.url.split("?")[0].endswith("003.ipynb")
    opened.value.close()

    notebook.button("Stop all").click()
    await_text(notebook, "Stop the sweep?")
    confirm_stop_all(page)
    await_text(notebook, "2 stopped, 1 finished")
    page.get_by_text("Stopping after this step").wait_for(state="hidden")
    page.wait_for_timeout(1500)
    shot(notebook, tmp_path, "board-ended")
    assert errors == []
    saved = notebook.save()
    outputs = saved["cells"][0]["outputs"]
    (table,) = [text for output in outputs if "<table" in (text := "".join(output["data"].get("text/html", "")))]
    assert table.count("<tr") == 4
    assert "003.ipynb" in table
    (charts,) = [output["data"] for output in outputs if "application/vnd.plotly.v1+json" in output["data"]]
    assert len(charts["application/vnd.plotly.v1+json"]["data"]) == 3 * 2 + 3  # curves, and trials that have the metric
    assert "".join(charts["image/svg+xml"]).startswith("<svg")
    assert len(json.dumps(saved)) < 500_000


def test_the_wizard_foretells_a_sweep_and_runs_it(open_notebook, lab, tiny_model, tmp_path):
    rows = [{"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(12)]
    (lab.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (
        f"model={str(tiny_model)!r}, data='rows.jsonl', mlflow=False, max_steps=2, max_length=64, dtype='float32'"
    )
    cell = f"import nbtune as nt\nwizard = nt.wizard({settings})"
    notebook = open_notebook(cell, name="wizard.ipynb", width=900, height=1500)
    page = notebook.page
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    notebook.run_to_end(0)
    page.locator("button.nt-step", has_text="Sweep").click()
    await_text(notebook, "Nothing is varied yet")
    rank = page.get_by_label("Rank r", exact=True).last
    rank.fill("2, many")
    rank.press("Tab")
    await_text(notebook, "Must be a whole number")
    shot(notebook, tmp_path, "wizard-sweep-wrong")
    rank.fill("2, 4")
    rank.press("Tab")
    await_text(notebook, "2 trials, 1 at a time")
    assert page.evaluate(STICKING_OUT) == []
    shot(notebook, tmp_path, "wizard-sweep")
    notebook.button("Run the sweep").click()
    await_text(notebook, "1 running")
    shot(notebook, tmp_path, "wizard-sweep-runs")
    notebook.button("Stop all").click()  # a trial takes a while to import what it needs
    await_text(notebook, "Stop the sweep?")
    confirm_stop_all(page)
    notebook.button("Go on").wait_for(timeout=PATIENCE * 1000)
    assert errors == []
    (written,) = lab.folder.glob("train-lora-tiny*.ipynb")
    (ledger,) = lab.folder.glob(f"sweeps/{written.stem}-*/trials.jsonl")
    tried = [event["params"] for line in ledger.open() if (event := json.loads(line))["type"] == "trial"]
    assert tried == [{"r": 2}, {"r": 4}]
