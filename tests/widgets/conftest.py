"""Replayed runs and JupyterLab for the tests of what a notebook shows."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session")
def trained_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Write a finished run with a LoRA adapter of a tiny model: `trained_run(runs_dir, run_id)` is the Run."""
    import torch
    from replay import write_run

    from nbtune.models import load
    from nbtune.peft import LoraConfig, get_peft_model
    from nbtune.spec import ModelSpec

    adapter = tmp_path_factory.mktemp("trained") / "adapter"
    base = load(ModelSpec(name=str(tiny_model), dtype="float32"), device="cpu")
    torch.manual_seed(1)
    model = get_peft_model(base.model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(adapter)

    def write(runs_dir: Path, run_id: str, **settings: Any) -> Any:
        run = write_run(runs_dir, run_id, name=str(tiny_model), **settings)
        shutil.copytree(adapter, run.path / "adapter")
        return run

    return write
