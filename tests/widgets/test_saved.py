"""What stays in the file: notebooks run by papermill and nbclient, read back without a kernel."""

import json
from pathlib import Path

import nbformat
import papermill
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter

from nbtune_widgets import charts
from tests.widgets.replay import write_run

HERE = Path(__file__).parent
SETUP = f"import sys; sys.path.insert(0, {str(HERE)!r})\nfrom replay import ReplayRun\nimport nbtune_widgets\n"


def notebook(*cells):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return book


def bundles(book):
    return [output["data"] for cell in book.cells for output in cell.get("outputs", []) if "data" in output]


def errors(book):
    return [output for cell in book.cells for output in cell.get("outputs", []) if output.output_type == "error"]


def plots(book):
    return [data for data in bundles(book) if charts.PLOTLY in data]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A 1,000-step run, watched under papermill."""
    folder = tmp_path_factory.mktemp("saved")
    nbformat.write(
        notebook(SETUP + "run = ReplayRun(1000, 0.004)\nnbtune_widgets.watch(run)\nrun.wait()"), folder / "in.ipynb"
    )
    with (folder / "stderr").open("w") as stderr:
        papermill.execute_notebook(
            folder / "in.ipynb", folder / "out.ipynb", progress_bar=False, stderr_file=stderr, log_output=True
        )
    return folder


def test_the_finished_charts_are_in_the_cell(saved):
    book = nbformat.read(saved / "out.ipynb", 4)
    assert len(plots(book)) == 1  # trap 4: one output that was updated, not one for each update
    data = plots(book)[0]
    steps = next(trace for trace in data[charts.PLOTLY]["data"] if trace["name"] == "loss")["x"]
    assert (steps[0], steps[-1]) == (1, 1000)  # trap 3: not the chart as it was born
    assert data["image/svg+xml"].startswith("<svg")
    assert not errors(book)


def test_it_stays_under_a_megabyte(saved):
    assert (saved / "out.ipynb").stat().st_size < 400_000


def test_nothing_went_wrong_in_a_thread(saved):
    assert "Exception in thread" not in (saved / "out.ipynb").read_text()
    assert "Traceback" not in (saved / "stderr").read_text()


def test_without_widget_state_the_result_is_still_there(saved):
    """Trap 16: JupyterLab saves no widget state, so what counts is outside of it."""
    book = nbformat.read(saved / "out.ipynb", 4)
    book.metadata.pop("widgets", None)
    html, _ = HTMLExporter().from_notebook_node(book)
    assert "<svg" in html or "image/svg+xml" in html
    assert "Held-out loss" in html
    assert "2,949,120 parameters" in html


def test_what_it_answered_stays_too(saved):
    table = next(data["text/html"] for data in bundles(nbformat.read(saved / "out.ipynb", 4))
                 if "Held-out loss" in data.get("text/html", ""))  # fmt: skip
    assert "<summary>What it answered</summary>" in table
    assert table.count(">step 0<") == table.count(">step 1000<") == 3
    assert "max_steps: 1000" in table  # the spec, folded


def test_the_table_of_runs_is_seen_without_widgets(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, f"2026112{seed}-100000-run-{seed}", 20, seed=seed)
    book = notebook(f"import nbtune as nt\nnt.runs({str(tmp_path)!r})")
    NotebookClient(book, timeout=60).execute()
    (output,) = book.cells[0].outputs
    assert "application/vnd.jupyter.widget-view+json" in output.data
    assert output.data["text/html"].count("<tr>") == 3
    assert output.data["text/html"].count("<polyline") == 2
    assert "run-1" in output.data["text/html"]


def test_the_live_charts_are_folded_away(saved):
    state = nbformat.read(saved / "out.ipynb", 4).metadata["widgets"]["application/vnd.jupyter.widget-state+json"]
    outputs = [
        model["state"].get("outputs") for model in state["state"].values() if model["model_name"] == "OutputModel"
    ]
    assert outputs == [[]]


def test_a_thread_that_draws_across_cells_is_saved_too():
    """Trap 5: text and charts of a thread must not be lost; the run ends in a later cell than it began in."""
    book = notebook(
        SETUP + "run = ReplayRun(60, 0.01)\nview = nbtune_widgets.show(run)",
        "1 + 1",
        "run.wait()\nimport time\nwhile not view._settled: time.sleep(0.05)",
    )
    NotebookClient(book, timeout=60).execute()
    assert charts.PLOTLY in book.cells[0].outputs[1].data
    assert "finished" in book.cells[0].outputs[2].data["text/html"]
    assert book.cells[2].outputs == []
    assert len(json.dumps(book)) < 400_000


def test_a_failed_run_fails_the_notebook_and_keeps_its_charts(tmp_path):
    """Trap 1: a run that died in its thread must not leave a notebook that passes."""
    nbformat.write(
        notebook(SETUP + "run = ReplayRun(60, 0.01, 30)\nnbtune_widgets.watch(run)\nrun.wait()"), tmp_path / "in.ipynb"
    )
    with pytest.raises(papermill.PapermillExecutionError, match="Loss is not a number"):
        papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", progress_bar=False)
    book = nbformat.read(tmp_path / "out.ipynb", 4)
    assert len(plots(book)) == 1
    assert any("Failed with" in data.get("text/html", "") for data in bundles(book))


def test_a_click_that_fails_is_shown_not_raised(tmp_path):
    """Trap 21: an exception in a callback is an error output that nbclient passes over."""
    click = """
from nbtune.errors import RunError
run = ReplayRun(5, 0.001); run.wait(); run.status = "interrupted"
def refuse(): raise RunError("No checkpoint", "", "Start anew.")
run.resume = refuse
view = nbtune_widgets.LiveView(run)
view.show()
view.resume_button.click()
import time; time.sleep(1)
print(view.notice.value)
"""
    book = notebook(SETUP + click)
    NotebookClient(book, timeout=60).execute()
    assert not errors(book)
    assert "No checkpoint" in "".join(output.text for output in book.cells[0].outputs if output.output_type == "stream")
