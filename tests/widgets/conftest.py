"""Replayed runs and JupyterLab for the tests of what a notebook shows."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # replay.py, browser.py


@pytest.fixture(scope="module", params=["JupyterLab Light"])
def lab(request, tmp_path_factory):
    """A JupyterLab server whose kernels find `replay`; ask for a dark one with indirect parametrisation."""
    from browser import Lab

    server = Lab(tmp_path_factory.mktemp("lab"), request.param, python_path=(HERE,))
    yield server
    server.close()


@pytest.fixture
def open_notebook(lab, chromium):
    """Write cells to a notebook and open it in a page of its own."""
    from browser import Notebook

    opened = []

    def open_(*cells, name="notebook.ipynb", **size):
        if cells:
            lab.write(name, *cells)
        opened.append(Notebook(lab, chromium, name, **size))
        return opened[-1]

    yield open_
    for notebook in opened:
        notebook.close()
