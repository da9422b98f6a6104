"""The notebooks that come with nbtune, executed by papermill on the real model, and what they leave behind."""

import json

import nbformat
import pytest

from nbtune.notebook import NotebookError, execute, packaged
from nbtune.run import Run, runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebooks")
    rows = [{"prompt": f"What is {n} plus one?", "completion": f"It is {n + 1}."} for n in range(40)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def trained(workspace):
    """The executed train.ipynb and its run."""
    parameters = {
        "data": str(workspace / "sums.jsonl"), "r": 4, "max_steps": 3, "max_length": 64,
        "runs_dir": str(workspace / "runs"), "run_id": "first",
        "settings": {"eval_fraction": 0.2, "eval_steps": 2, "eval_samples": 0, "target_modules": ["q_proj"]},
    }  # fmt: skip
    output = execute(packaged("train.ipynb"), workspace / "train.ipynb", parameters)
    return output, Run.open("first", runs_dir=workspace / "runs")


def outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    return [output for cell in cells for output in cell.get("outputs", [])]


def bundles(path):
    return [output["data"] for output in outputs(path) if "data" in output]


def test_train_trains_what_its_parameters_say(trained):
    _, run = trained
    assert run.status == "finished"
    assert (run.spec.method.r, run.spec.training.max_steps, run.spec.data.eval_fraction) == (4, 3, 0.2)
    assert run.spec.method.target_modules == ["q_proj"]


def test_the_finished_charts_are_in_the_saved_notebook(trained):
    path, run = trained
    figures = [
        bundle["application/vnd.plotly.v1+json"]
        for bundle in bundles(path)
        if "application/vnd.plotly.v1+json" in bundle
    ]
    assert len(figures) == 1
    losses = [event["loss"] for event in run.events() if event["type"] == "train"]
    drawn = next(trace for trace in figures[0]["data"] if trace["name"] == "loss")
    assert drawn["x"] == [1, 2, 3]
    assert drawn["y"] == pytest.approx(losses, rel=1e-3)  # rounded to be drawn
    assert path.stat().st_size < 1_000_000


def test_nothing_on_stderr_speaks_of_a_thread(trained):
    texts = [output["text"] for output in outputs(trained[0]) if output.get("name") == "stderr"]
    assert not any("Exception in thread" in text or "Traceback" in text for text in texts)


def test_the_charts_show_without_a_kernel(trained):
    from nbconvert import HTMLExporter

    html, _ = HTMLExporter().from_filename(str(trained[0]))
    assert html.count('src="data:image/svg+xml;base64,') == 1
    assert "Held-out loss" in html


def test_compare_answers_with_the_base_and_the_adapter(trained, workspace):
    parameters = {
        "runs": ["first"], "runs_dir": str(workspace / "runs"), "questions": ["What is 3 plus one?"],
        "max_new_tokens": 8, "chat": False,
    }  # fmt: skip
    output = execute(packaged("compare.ipynb"), workspace / "compare.ipynb", parameters)
    tables = [bundle["text/html"] for bundle in bundles(output) if "text/html" in bundle]
    assert any("eval_loss_after" in table for table in tables)
    assert any("What is 3 plus one?" in table and "base" in table for table in tables)


def test_the_wizard_starts_under_papermill(workspace):
    """At once, while its worker is still reading the model: the two must not import transformers together."""
    folder = workspace / "wizard"
    settings = {
        "source": str(workspace / "sums.jsonl"), "max_steps": 2, "max_length": 64, "eval_fraction": 0.2,
        "eval_samples": 0, "target_modules": ["v_proj"],
    }  # fmt: skip
    folder.mkdir()
    output = execute(
        packaged("wizard.ipynb"), folder / "out.ipynb", {"start_with": settings, "start": True}, cwd=folder
    )
    (run,) = runs(folder / "runs")
    assert run.status == "finished"
    assert run.summary()["steps"] == 2
    assert output.stat().st_size < 1_000_000
    book = nbformat.read(output, 4)
    bundles = [entry["data"] for cell in book.cells for entry in cell.get("outputs", []) if "data" in entry]
    assert len([data for data in bundles if "application/vnd.plotly.v1+json" in data]) == 1
    assert any("Peak memory" in data.get("text/html", "") for data in bundles)
    assert "Exception in thread" not in json.dumps(book)


def test_a_run_that_cannot_start_fails_the_notebook(workspace):
    parameters = {"data": str(workspace / "nothing.jsonl"), "runs_dir": str(workspace / "none")}
    with pytest.raises(NotebookError, match=r"nothing\.jsonl"):
        execute(packaged("train.ipynb"), workspace / "failed.ipynb", parameters)
    assert not (workspace / "none").exists()


def test_an_unknown_parameter_is_refused_before_anything_runs(workspace):
    with pytest.raises(NotebookError, match="learning_rate"):
        execute(packaged("train.ipynb"), workspace / "refused.ipynb", {"learning_rat": 1e-3})
    assert not (workspace / "refused.ipynb").exists()
