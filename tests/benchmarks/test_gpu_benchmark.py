"""benchmarks/gpu.py on a machine that has little: only torch, transformers, peft, accelerate and what those need."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NOT_THERE = """
import importlib.util, runpy, sys
NOT_THERE = {"anywidget", "bitsandbytes", "datasets", "gguf", "gradio", "ipykernel", "ipywidgets", "mlflow", "pandas"}
NOT_THERE |= {"papermill", "plotly", "trl"}
missing = lambda name: name.split(".")[0] in NOT_THERE
really_find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if missing(name) else really_find(name, package)
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if missing(name):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Nothing())
"""


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", NOT_THERE + code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_rooms_that_compute_need_no_more_than_torch_and_transformers():
    modules = """
NOT_THERE |= {"accelerate", "peft", "psutil", "triton"}
import nbtune.kernels, nbtune.modules, nbtune.peft, nbtune.fused
import nbtune.kernels.attention, nbtune.kernels.linear_cross_entropy, nbtune.modules.offload, nbtune.peft.model
import nbtune.train.loss
assert not NOT_THERE & {name.split(".")[0] for name in sys.modules}
"""
    run(modules)


def test_it_compares_both_sides_and_its_figures_are_whole(tmp_path):
    file = tmp_path / "gpu.json"
    code = f"sys.path.insert(0, {str(BENCHMARKS)!r})\nrunpy.run_module('gpu', run_name='__main__', alter_sys=True)"
    options = ["--tiny", "--device", "cpu", "--rounds", "10", "--one-process", "--threads", "1", "--json", str(file)]
    printed = run(code, *options)
    assert "no page: plotly is not installed" in printed
    figures = json.loads(file.read_text())
    assert [row["kernel"] for row in figures["kernels"]] == [
        "RMSNorm", "rotary embedding", "SwiGLU", "linear + cross-entropy",
    ]  # fmt: skip
    assert all(row["torch_ms"] > 0 and row["triton_ms"] is None for row in figures["kernels"])
    assert figures["ours"]["name"] == "nbtune"
    assert figures["theirs"]["name"] == "peft"
    assert figures["speed_ratio"] > 0
    curve = figures["losses"]["nbtune"]
    assert curve[-1] < curve[0] - 0.05  # it learns, so curves that agree say something
    assert max(figures["loss_deviation"].values()) < 1e-3
