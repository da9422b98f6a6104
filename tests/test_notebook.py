"""Notebooks as functions: parameters are checked before anything runs, failures are kept and told."""

from pathlib import Path

import nbformat
import pytest

from nbtune.notebook import NotebookError, check_parameters, copy_packaged, execute, packaged, parameters


def notebook(path, *cells, tag=("parameters",)):
    made = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    made.cells = [nbformat.v4.new_code_cell(source) for source in cells]
    for cell, name in zip(made.cells, tag, strict=False):
        cell.metadata["tags"] = [name]
    nbformat.write(made, path)
    return path


def test_reads_names_and_defaults_without_running_anything(tmp_path):
    path = notebook(tmp_path / "a.ipynb", "r: int = 8\nlr = 1e-3\nnames = ['a']\nnow = print('ran')\nnothing = None")
    assert parameters(path) == {"r": 8, "lr": 1e-3, "names": ["a"], "now": None, "nothing": None}


@pytest.mark.parametrize("tags", [(), ("parameters", "parameters")])
def test_exactly_one_parameters_cell(tmp_path, tags):
    path = notebook(tmp_path / "a.ipynb", "r = 8", "s = 9", tag=tags)
    with pytest.raises(NotebookError, match=f"{len(tags)} cells tagged"):
        parameters(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rr": 1}, "no parameter 'rr'"),
        ({"r": "8"}, "of type str"),
        ({"r": True}, "of type bool"),
        ({"r": {1}}, "is a set"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, values, message):
    path = notebook(tmp_path / "a.ipynb", "r = 8\nopen('ran', 'w')")
    with pytest.raises(NotebookError, match=message):
        execute(path, tmp_path / "out" / "b.ipynb", values)
    assert not (tmp_path / "out").exists()


def test_a_result_is_never_overwritten(tmp_path):
    path = notebook(tmp_path / "a.ipynb", "r = 8")
    with pytest.raises(NotebookError, match="exists already"):
        execute(path, path)


def test_parameters_arrive_and_a_failure_is_kept_in_the_output(tmp_path):
    path = notebook(tmp_path / "a.ipynb", "r = 8", "print('r is', r)", "1 / 0")
    with pytest.raises(NotebookError, match="ZeroDivisionError"):
        execute(path, tmp_path / "out.ipynb", {"r": 3})
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    printed = [output["text"] for cell in cells for output in cell.get("outputs", []) if output.get("name") == "stdout"]
    assert printed == ["r is 3\n"]


def test_two_notebooks_in_one_folder_do_not_share_their_sockets(tmp_path):
    where = "from ipykernel import get_connection_info\nprint(get_connection_info(unpack=True)['ip'])"
    path = notebook(tmp_path / "a.ipynb", "r = 8", where)
    execute(path, tmp_path / "out.ipynb", {"r": 3}, cwd=tmp_path)
    (printed,) = [output["text"].strip() for cell in nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
                  for output in cell.get("outputs", [])]  # fmt: skip
    assert Path(printed).is_absolute()
    assert not Path(printed).is_relative_to(tmp_path)
    assert not Path(printed).parent.exists()  # gone with the kernel


def test_a_kernel_that_dies_is_said_to_have_died(tmp_path):
    path = notebook(tmp_path / "a.ipynb", "r = 8", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(NotebookError, match="died"):
        execute(path, tmp_path / "out.ipynb")


@pytest.mark.parametrize("name", ["train.ipynb", "compare.ipynb", "wizard.ipynb"])
def test_packaged_notebooks_are_stripped_and_have_parameters(name):
    cells = nbformat.read(packaged(name), as_version=4).cells
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)
    assert parameters(packaged(name))


def test_train_takes_any_setting(tmp_path):
    check_parameters(packaged("train.ipynb"), {"settings": {"warmup_ratio": 0.1}, "learning_rate": 1, "r": 4})


def test_a_copy_is_made_once_and_never_replaced(tmp_path):
    copy = copy_packaged("wizard.ipynb", tmp_path / "work")
    copy.write_text("mine")
    assert copy_packaged("wizard.ipynb", tmp_path / "work").read_text() == "mine"
