"""The benchmark of the loss runs all its cases on a tiny head."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import loss


def test_every_case_is_measured_and_written(tmp_path):
    sizes = ["--tokens", "40", "--features", "8", "--words", "96", "--rounds", "2", "--threads", "1", "--one-process"]
    loss.main([*sizes, "--json", str(tmp_path / "loss.json"), "--page", str(tmp_path / "loss.html")])
    found = json.loads((tmp_path / "loss.json").read_text())
    cases = [(case["dtype"], case["masked"]) for case in found["cases"]]
    assert cases == [("bfloat16", 0.6), ("bfloat16", 0.0), ("float32", 0.6), ("float32", 0.0)]
    assert found["speed_ratio"] == found["cases"][0]["speed_ratio"] > 0
    for case in found["cases"]:
        assert case["loss_deviation"] < (1e-3 if case["dtype"] == "bfloat16" else 1e-6)
    assert found["ours"]["loss"] == pytest.approx(found["theirs"]["loss"], rel=1e-3)
    assert len(found["ours"]["all_seconds"]) == 2
