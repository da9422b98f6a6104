"""The wizard's pages in JupyterLab, driven by Chromium: the map by mouse and keyboard, remedies, dark and narrow."""

import re

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]

CELLS = "wizard.spec.method.target_modules, wizard.spec.method.layers_to_transform"


def await_worker(notebook, seconds=240):
    """Until the wizard's status line has been empty for half a second."""
    notebook.page.wait_for_timeout(500)
    busy = "() => document.querySelectorAll('.nbtune .nt-working').length == 0"
    notebook.page.wait_for_function(busy, timeout=seconds * 1000)
    notebook.page.wait_for_timeout(500)


def await_text(notebook, text, seconds=120):
    notebook.page.wait_for_function("t => document.body.innerText.includes(t)", arg=text, timeout=seconds * 1000)


def go(notebook, step):
    notebook.page.locator("button.nt-step", has_text=step).click()
    await_worker(notebook)


def cell(notebook, row, layer):
    return notebook.page.locator(f'[data-at="{row},{layer}"]')


def test_the_map_by_mouse_and_by_keyboard(open_notebook, tmp_path):
    notebook = open_notebook("import nbtune as nt\nwizard = nt.wizard(mlflow=False)", CELLS, name="map.ipynb")
    page = notebook.page
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    notebook.run_to_end(0)
    await_worker(notebook)
    go(notebook, "Method")
    assert page.locator(".nt-map [data-at]").count() == 210
    assert page.locator(".nt-layers").is_hidden()  # the plain rows are for where the map is not
    page.locator("[role=rowheader] button", has_text="down_proj").click()
    start, end = (cell(notebook, 4, layer).bounding_box() for layer in (0, 14))
    page.mouse.move(start["x"] + 4, start["y"] + 4)
    page.mouse.down()
    page.mouse.move(end["x"] + 4, end["y"] + 4, steps=40)
    page.mouse.up()
    await_text(notebook, "165 of 210 modules")
    assert cell(notebook, 4, 14).get_attribute("aria-selected") == "false"
    assert cell(notebook, 4, 15).get_attribute("aria-selected") == "true"

    cell(notebook, 0, 3).click()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    await_text(notebook, "162 of 210 modules")
    for row, layer in ((0, 3), (0, 4), (1, 4)):
        assert cell(notebook, row, layer).get_attribute("aria-selected") == "false"
    focused = page.evaluate("() => document.activeElement.dataset.at")
    assert focused == "1,4"  # JupyterLab did not take the arrow keys
    notebook.shot(tmp_path / "map.png")
    notebook.run_to_end(1)
    assert r"layers\\.(1[5-9]|2\\d)\\.mlp\\.gate_proj" in notebook.text(1)
    assert errors == []


def test_a_remedy_and_a_preset_are_clicked(open_notebook):
    notebook = open_notebook(
        "import nbtune as nt\nwizard = nt.wizard(mlflow=False, max_length=9000)", name="remedy.ipynb"
    )
    notebook.run_to_end(0)
    await_worker(notebook)
    go(notebook, "Review")
    notebook.button("shorten to 8,192").click()
    await_worker(notebook)
    assert "9,000 → 8,192" in notebook.page.locator(".nbtune").first.inner_text()
    notebook.button("Undo").click()
    await_worker(notebook)
    notebook.button("shorten to 8,192").wait_for()
    go(notebook, "Training")
    notebook.page.get_by_role("button", name=re.compile("Quick look")).click()
    await_worker(notebook)
    go(notebook, "Review")
    notebook.page.wait_for_function("() => document.body.innerText.includes('Nothing stands in the way')")
    assert "20 steps" in notebook.page.locator(".nbtune").first.inner_text()


@pytest.mark.parametrize("lab", ["JupyterLab Dark"], indirect=True)
def test_every_step_is_readable_in_the_dark_and_in_900_pixels(open_notebook, tmp_path):
    notebook = open_notebook("import nbtune as nt\nwizard = nt.wizard(mlflow=False)", name="dark.ipynb", width=900)
    notebook.run_to_end(0)
    await_worker(notebook)
    page = notebook.page
    sticking_out = """() => {
      const card = document.querySelector('.nbtune.nt-card').getBoundingClientRect();
      return [...document.querySelectorAll('.nbtune.nt-card *')].filter(node => {
        const box = node.getBoundingClientRect();
        return box.width && box.right > card.right + 1 && !node.closest('pre, .nt-tokens, style');
      }).map(node => node.className || node.tagName);
    }"""
    dim = """() => {
      const light = color => color.match(/[\\d.]+/g).map(Number);
      const read = '.nbtune button, .nbtune .nt-b, .nbtune .nt-help, .nbtune input';
      return [...document.querySelectorAll(read)].filter(node => {
        if (!node.offsetParent || node.disabled) return false;
        const [red, green, blue] = light(getComputedStyle(node).color);
        return 0.3 * red + 0.6 * green + 0.1 * blue < 90;
      }).map(node => node.className || node.tagName);
    }"""
    for step in ("Model", "Data", "Method", "Training", "Review"):
        go(notebook, step)
        notebook.shot(tmp_path / f"{step}.png")
        assert page.evaluate(sticking_out) == [], step
        assert page.evaluate(dim) == [], step


def test_it_is_there_two_seconds_after_import(open_notebook):
    cells = "import nbtune as nt\nimport nbtune_widgets", "wizard = nt.wizard(mlflow=False)"
    notebook = open_notebook(*cells, name="paint.ipynb")
    notebook.run_to_end(0)
    script = """() => new Promise(resolve => {
      const began = performance.now();
      const look = () => document.querySelector('.nbtune .nt-facts, .nbtune .nt-known, .nbtune .nt-field')
        ? resolve(performance.now() - began) : requestAnimationFrame(look);
      look();
    })"""
    notebook.cell(1).locator(".jp-InputArea-editor").click()
    notebook.page.keyboard.press("Control+Enter")
    assert notebook.page.evaluate(script) < 2000
