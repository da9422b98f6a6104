"""Runs in JupyterLab, driven by Chromium: pause, samples, errors, a reload, and the table of all runs."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import replay

pytestmark = [pytest.mark.browser, pytest.mark.slow]

PLOT = ".js-plotly-plot"
SHOTS = os.environ.get("NBTUNE_SHOTS")  # a folder to keep the pictures in, which are then of both themes
LIGHT, DARK = "JupyterLab Light", "JupyterLab Dark"
LIVE = """
from replay import ReplayRun
import nbtune_widgets
run = ReplayRun(100, 0.05)
view = nbtune_widgets.show(run)
"""
STEP = "() => Number(document.body.innerText.match(/step (\\d+) of 100/)?.[1] ?? 0)"


def await_text(notebook, text, seconds=60):
    notebook.page.wait_for_function("t => document.body.innerText.includes(t)", arg=text, timeout=seconds * 1000)


def shot(notebook, path: Path, name: str) -> None:
    notebook.page.wait_for_timeout(900)
    notebook.shot(path / f"{name}.png")
    if SHOTS:
        shutil.copy(path / f"{name}.png", Path(SHOTS) / f"{name}.png")


@pytest.mark.parametrize("lab", [LIGHT, DARK] if SHOTS else [DARK], indirect=True)
def test_a_live_run_pauses_shows_samples_survives_a_reload_and_ends(open_notebook, request, tmp_path):
    theme = "dark" if "Dark" in request.node.callspec.params["lab"] else "light"
    notebook = open_notebook(LIVE, "6 * 7", name=f"live-{theme}.ipynb", width=900)
    errors = []
    notebook.page.on("pageerror", lambda error: errors.append(str(error)))
    notebook.run_to_end(0)
    notebook.page.wait_for_selector(PLOT)
    notebook.page.wait_for_function(f"({STEP})() >= 30", timeout=20_000)
    assert notebook.button("Resume").count() == 0 or not notebook.button("Resume").is_visible()
    notebook.button("Pause").click()
    notebook.button("Resume").wait_for()
    await_text(notebook, "paused · step")
    at = notebook.page.evaluate(STEP)
    notebook.page.wait_for_timeout(1500)
    assert notebook.page.evaluate(STEP) == at
    assert not notebook.button("Pause").is_visible()
    notebook.page.get_by_role("button", name="▸ samples (3)").click()
    await_text(notebook, "How does `textwrap.dedent` treat <tabs>?")
    shot(notebook, tmp_path, f"live-paused-samples-{theme}")
    notebook.page.get_by_role("button", name="▾ samples (3)").click()

    notebook.save()
    notebook.page.reload()  # the kernel lives: the view comes back, with its buttons
    notebook.page.wait_for_selector(PLOT, timeout=60_000)
    notebook.button("Resume").click(timeout=60_000)
    notebook.page.wait_for_function(f"({STEP})() > {at}", timeout=20_000)
    shot(notebook, tmp_path, f"live-{theme}")
    await_text(notebook, "finished · step 100 of 100")
    notebook.button("Start a variation").wait_for()
    notebook.page.wait_for_selector(PLOT)  # in the card: the page forgot the places that are kept
    shot(notebook, tmp_path, f"ended-{theme}")
    assert errors == []
    assert len(json.dumps(notebook.save())) < 1_000_000


def test_a_failure_is_plain_and_its_traceback_a_click_away(open_notebook, tmp_path):
    cell = LIVE.replace("ReplayRun(100, 0.05)", "ReplayRun(100, 0.01, fail_at=47)")
    notebook = open_notebook(cell, name="failed.ipynb", width=900)
    notebook.run_to_end(0)
    await_text(notebook, "The checkpoint of step 40 is kept: Resume goes on from it.")
    folded = notebook.page.get_by_text("_require_finite").first
    assert not folded.is_visible()
    shot(notebook, tmp_path, "failed")
    notebook.page.get_by_text("Traceback", exact=True).first.click()
    folded.wait_for()
    selected = notebook.page.evaluate("getComputedStyle(document.querySelector('.nbtune details pre')).userSelect")
    assert selected == "all"
    shot(notebook, tmp_path, "failed-traceback")


@pytest.mark.parametrize("lab", [LIGHT, DARK] if SHOTS else [LIGHT], indirect=True)
def test_the_table_of_runs(open_notebook, lab, trained_run, request, tmp_path):
    theme = "dark" if "Dark" in request.node.callspec.params["lab"] else "light"
    folder = lab.folder / "runs"
    replay.write_run(folder, "20261122-100000-amber-heron", 100, seed=0)
    replay.write_run(folder, "20261121-090000-quiet-otter", 60, seed=7, learning_rate=1e-3, r=8)
    replay.write_run(folder, "20261119-080000-stray-finch", 80, seed=60, status="failed")
    trained_run(folder, "20261118-080000-brave-newt", steps=40, seed=90, status="stopped", max_length=256)
    notebook = open_notebook("import nbtune as nt\nnt.runs()", name="runs.ipynb", width=900)
    page = notebook.page
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    notebook.run_to_end(0)
    await_text(notebook, "brave-newt")
    assert page.locator(".nt-run svg").count() == 4
    shot(notebook, tmp_path, f"runs-{theme}")

    def order():
        return page.locator(".nt-run .nt-b").all_inner_texts()

    assert order() == ["amber-heron", "quiet-otter", "stray-finch", "brave-newt"]
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_function("() => document.querySelector('.nt-run .nt-b').innerText == 'amber-heron'")
    page.locator(".nt-run input").nth(0).check()
    page.locator(".nt-run input").nth(2).check()
    page.wait_for_selector(PLOT)
    await_text(notebook, "training.learning_rate")
    shot(notebook, tmp_path, f"runs-compared-{theme}")
    card = page.locator(".nbtune.nt-card").bounding_box()
    for line in page.locator(".nt-run .nt-grid > :last-child").all():
        box = line.bounding_box()
        assert box["x"] + box["width"] <= card["x"] + card["width"] + 1  # nothing sticks out

    page.locator(".nt-run input").nth(2).uncheck()
    page.get_by_role("button", name="Name and note").click()
    page.get_by_label("Name", exact=True).fill("baseline")
    page.get_by_label("Note").fill("r of 16 is enough")
    shot(notebook, tmp_path, f"runs-named-{theme}")
    page.get_by_role("button", name="Save", exact=True).click()
    await_text(notebook, "baseline")
    page.get_by_role("button", name="Delete", exact=True).click()
    await_text(notebook, "Delete baseline?")
    shot(notebook, tmp_path, f"runs-delete-{theme}")
    page.get_by_role("button", name="Move to the trash").click()
    await_text(notebook, "1 run moved to the trash")
    assert not (folder / "20261122-100000-amber-heron").exists()
    page.get_by_role("button", name="Undo").click()
    await_text(notebook, "4 runs")
    page.get_by_title("Select stray-finch").check()
    page.get_by_role("button", name="Open").click()
    page.wait_for_selector(PLOT)
    shot(notebook, tmp_path, f"runs-opened-{theme}")

    page.get_by_title("Select stray-finch").uncheck()
    page.get_by_title("Select brave-newt").check()
    page.locator(".nt-card button", has_text=re.compile("^Export$")).first.click()
    page.locator(".nt-export button", has_text="Merged model").click()
    page.get_by_role("button", name=re.compile("^f16 · ")).click()
    page.get_by_label("Push to a hub").check()
    page.get_by_label("Repository").wait_for()
    page.locator(".nt-export").scroll_into_view_if_needed()
    shot(notebook, tmp_path, f"export-form-{theme}")
    assert errors == []
    page.get_by_label("Push to a hub").uncheck()
    page.locator(".nt-export button.nt-primary").click()
    await_text(notebook, "48 of 48", 120)
    page.locator(".nt-proof").scroll_into_view_if_needed()
    shot(notebook, tmp_path, f"export-proof-{theme}")
    assert page.evaluate("getComputedStyle(document.querySelector('.nt-proof pre')).userSelect") == "all"
    card = page.locator(".nt-export").bounding_box()
    for part in page.locator(".nt-export .nt-asked > *, .nt-figures > *").all():
        box = part.bounding_box()
        assert box is None or box["x"] + box["width"] <= card["x"] + card["width"] + 1  # nothing sticks out
    assert (lab.folder / "brave-newt-merged-f16" / "model.safetensors").exists()
    assert errors == []
