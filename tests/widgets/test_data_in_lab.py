"""The Data step in JupyterLab driven by Chromium: dark, 900 pixels wide, by mouse and by keyboard."""

import json
import re

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]

SECONDS = 240
CELL = "import pandas as pd\nquiz = pd.DataFrame({'question': ['1?'] * 30, 'answer': ['2!'] * 30})\n"


def await_text(notebook, text):
    notebook.page.wait_for_function("t => document.body.innerText.includes(t)", arg=text, timeout=SECONDS * 1000)


def colors(notebook, selector):
    script = "s => { const c = getComputedStyle(document.querySelector(s)); return [c.color, c.backgroundColor] }"
    return [[int(part) for part in re.findall(r"\d+", color)[:3]] for color in notebook.page.evaluate(script, selector)]


@pytest.mark.parametrize("lab", ["JupyterLab Dark"], indirect=True)
def test_data_step_from_a_file_to_a_recipe(open_notebook, lab, tmp_path):
    rows = [{"instruction": f"Say <i>{n}</i>.", "output": "word " * (400 if n > 95 else n)} for n in range(1, 101)]
    (lab.folder / "words.json").write_text(json.dumps(rows))
    notebook = open_notebook(CELL + "import nbtune as nt\nwizard = nt.wizard(max_length=256)", width=900, height=1400)
    page = notebook.page
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    notebook.run_to_end(0)
    page.locator("button.nt-step", has_text="Data").click()
    notebook.button("words.json").click(timeout=SECONDS * 1000)
    await_text(notebook, "100 rows · 95 train · 5 held out")
    await_text(notebook, "5 rows are longer than 256 tokens.")
    page.locator(".nt-tokens", has_text="Say <i>1</i>.").wait_for()
    assert page.locator(".nt-tokens .nt-t1").first.inner_text().startswith("word")
    assert page.locator(".nt-tokens .nt-tE").first.inner_text() == "<|im_end|>"
    notebook.shot(tmp_path / "data.png")

    notebook.button("›").focus()  # by the keyboard from here
    page.keyboard.press("Enter")
    await_text(notebook, "Say <i>2</i>.")
    page.get_by_label("row", exact=True).fill("99")
    page.keyboard.press("Tab")
    await_text(notebook, "cut here, after 256 tokens")
    notebook.button("as in the source").press("Space")
    await_text(notebook, '"instruction": "Say <i>99</i>."')
    notebook.button("drop them").press("Enter")
    await_text(notebook, "5 left out")
    page.locator("details.nt-fold summary").press("Enter")
    await_text(notebook, '"instruction": "Say <i>96</i>."')
    page.locator(".nt-doors button", has_text="Recipe · 1 step").press("Enter")
    await_text(notebook, "100 → 95 rows, 5 dropped")
    notebook.shot(tmp_path / "recipe.png")

    card = page.locator(".nbtune.nt-card").first.bounding_box()
    for part in page.locator(".nbtune.nt-card .widget-hbox > *").all():
        box = part.bounding_box()
        assert box is None or box["x"] + box["width"] <= card["x"] + card["width"] + 1  # nothing sticks out
    for selector in (".nt-tokens", ".nt-named", ".nt-t0", ".nt-doors button", ".nt-panel select"):
        color, _ = colors(notebook, f".nbtune {selector}")
        assert min(color) > 110  # light on dark

    notebook.button("quiz · 30 rows").click()
    await_text(notebook, "columns question and answer")
    page.locator(".nt-doors button", has_text="Chat template").click()
    notebook.button("▸ Text").click()
    box = page.locator(".nt-panel textarea").last
    box.fill(box.input_value().replace("<|im_start|>", "<|im_start|>dear "))
    await_text(notebook, "<|im_start|>dear user")
    notebook.shot(tmp_path / "template.png")
    assert errors == []
