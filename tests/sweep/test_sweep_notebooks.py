"""`nbtune test-notebooks`: a folder of notebooks, each executed once, reported like tests."""

import sys

import nbformat
import pytest

from nbtune import cli
from nbtune.notebook import NotebookError, packaged
from nbtune.sweep.notebooks import find_notebooks, known_parameters, run_notebooks


def written(path, *sources, tagged=1):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    for cell in book.cells[:tagged]:
        cell.metadata["tags"] = ["parameters"]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(book, path)
    return path


@pytest.fixture
def folder(tmp_path):
    written(tmp_path / "books" / "good.ipynb", "max_steps = 100", "assert max_steps == 3\nprint('few')")
    written(tmp_path / "books" / "wrong.ipynb", "r = 4", "r = 5", tagged=2)
    return tmp_path / "books"


def test_the_command_reports_like_pytest(folder, tmp_path, monkeypatch, capsys):
    """A notebook that passes, one that raises, one that cannot be given its parameters."""
    written(folder / "bad.ipynb", "1 / 0", tagged=0)
    out = tmp_path / "out"
    command = ["nbtune", "test-notebooks", str(folder), "--param", "max_steps=3", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:4] for line in lines[:3]] == [
        ["FAILED", "[", "33%]"],
        ["PASSED", "[", "66%]"],
        ["FAILED", "[100%]", lines[2].split()[-1]],
    ]
    assert "2 failed, 1 passed in" in lines[-1]
    text = "\n".join(lines)
    assert "ZeroDivisionError" in text
    assert "2 cells tagged 'parameters'" in text
    assert "few" in (out / "02-good.ipynb").read_text()
    assert "ZeroDivisionError" in (out / "01-bad.ipynb").read_text()
    with pytest.raises(SystemExit):
        cli.main()
    assert "is not empty" in " ".join(capsys.readouterr().err.split())


def test_a_notebook_that_takes_too_long_has_failed(tmp_path):
    slow = written(tmp_path / "slow.ipynb", "import time; time.sleep(600)", tagged=0)
    (result,) = run_notebooks([slow], {}, tmp_path / "out", timeout=2)
    assert (result.outcome, result.error) == ("died", "It took more than 2 s.")
    assert result.seconds < 60


def test_notebooks_are_given_what_they_know():
    values = {"max_steps": 2, "eval_samples": 0, "chat": False}
    assert known_parameters(packaged("train.ipynb"), values) == {"max_steps": 2, "settings": {"eval_samples": 0}}
    assert known_parameters(packaged("compare.ipynb"), values) == {"chat": False}
    assert known_parameters(packaged("wizard.ipynb"), values) == {}
    with pytest.raises(NotebookError, match="of type str"):
        known_parameters(packaged("train.ipynb"), {"max_steps": "two"})


def test_folders_and_notebooks_are_found_in_order(folder):
    good, wrong = folder / "good.ipynb", folder / "wrong.ipynb"
    written(folder / ".ipynb_checkpoints" / "good.ipynb", "r = 4")
    assert find_notebooks([folder]) == [good, wrong]
    assert find_notebooks([wrong, folder]) == [wrong, good]
    for nothing in (folder / "none", folder.parent / "empty"):
        (folder.parent / "empty").mkdir(exist_ok=True)
        with pytest.raises(NotebookError):
            find_notebooks([nothing])
