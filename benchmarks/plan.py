"""Planned against measured peak memory of runs of the packaged 135M model, each in a process of its own.

    uv run python benchmarks/plan.py                      # 12 runs: LoRA, full, 4-bit; 256 and 512 tokens; 1 and 4 rows
    uv run python benchmarks/plan.py --only lora --fit    # and the constants of nbtune/plan that would fit best

A run takes some steps, so that the heap has its holes. `--fit` prints least squares of what is measured beyond the
tensors that the plan counts: LIBRARIES_BYTES + HEAP_SHARE * (the most that activations and loss take). Run it on a
quiet machine after kernels changed, put both into nbtune/plan/__init__.py, and run it again. Loading is left out: a
run's peak counts from there on, and what loading takes is in its `start` event.
"""

from __future__ import annotations

import argparse
import datetime
import html
import itertools
import json
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from _report import machine, versions

import nbtune as nt
from nbtune.plan import HEAP_SHARE, LIBRARIES_BYTES, format_bytes

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": {"r": 16, "lora_alpha": 16}},
    "full": {"method": "full"},
    "4-bit": {"method": {"r": 16, "lora_alpha": 16}, "model": {"load_in_4bit": True}},
}
LENGTHS, ROWS = (256, 512), (1, 4)
TARGET = 0.10  # of the measured peak


def spec_of(method: str, length: int, rows: int, steps: int) -> nt.RunSpec:
    """A run without tracking and with every activation kept, for steps of one micro-batch."""
    training = {
        "max_steps": steps, "max_length": length, "per_device_train_batch_size": rows, "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False, "eval_steps": 0, "save_steps": 0, "learning_rate": 1e-5,
    }  # fmt: skip
    data = {"source": "stdlib-docs", "max_rows": 400, "max_eval_rows": 1}
    return nt.RunSpec.from_dict({"data": data, "training": training, "tracking": {"mlflow": False}, **METHODS[method]})


def measure(settings: dict[str, Any], threads: int | None) -> dict[str, Any]:
    """In a process of its own: a run's plan, by part, and its measured peak."""
    if threads is not None:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        run = nt.train(nt.RunSpec.from_dict(settings), runs_dir=folder).wait()
        start = next(event for event in run.events() if event["type"] == "start")
        summary = run.summary()
    planned, measured = summary["planned_peak_bytes"], summary["measured_peak_bytes"]
    return {
        "planned_bytes": planned,
        "measured_bytes": measured,
        "ratio": planned / measured,
        "parts": start["planned_parts"],
        "tokens_per_second": summary["train_tokens_per_second"],
    }


def fitted(results: list[dict[str, Any]]) -> tuple[float, float]:
    """LIBRARIES_BYTES and HEAP_SHARE with the least relative errors."""
    tensors = [sum(size for name, size in row["parts"].items() if name != "overhead") for row in results]
    varying = [(row["parts"]["overhead"] - LIBRARIES_BYTES) / HEAP_SHARE for row in results]
    measured = np.array([row["measured_bytes"] for row in results], float)
    columns = np.stack([np.ones(len(results)), np.array(varying, float)], axis=1) / measured[:, None]
    libraries, share = np.linalg.lstsq(columns, (measured - np.array(tensors)) / measured, rcond=None)[0]
    return float(libraries), float(share)


def page(figures: dict[str, Any]) -> str:
    """Bars of planned and measured peaks, and the figures."""
    rows = figures["runs"]
    names = [row["name"] for row in rows]
    chart = go.Figure(
        [
            go.Bar(name="planned", x=names, y=[row["planned_bytes"] / 1e9 for row in rows]),
            go.Bar(name="measured", x=names, y=[row["measured_bytes"] / 1e9 for row in rows]),
        ],
        {"title": {"text": "Peak memory of a run, GB"}, "template": "plotly_white", "barmode": "group"},
    )
    text = html.escape(json.dumps({key: value for key, value in figures.items() if key != "runs"}, indent=1))
    head = "<!doctype html><meta charset=utf-8><title>nbtune plan</title>"
    return f"{head}{chart.to_html(full_html=False)}<pre>{text}</pre>"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path, metavar="FILE", help="write the figures as one JSON object")
    options.add_argument("--page", type=Path, metavar="FILE", help="write a Plotly page")
    options.add_argument("--threads", type=int, help="torch's threads; without it torch's own choice")
    options.add_argument("--steps", type=int, default=6, help="of each run")
    options.add_argument("--only", choices=METHODS, help="one method")
    options.add_argument("--fit", action="store_true", help="print the constants of the plan that would fit best")
    arguments = options.parse_args()

    runs = []
    methods = [arguments.only] if arguments.only else list(METHODS)
    for method, length, rows in itertools.product(methods, LENGTHS, ROWS):
        settings = spec_of(method, length, rows, arguments.steps).to_dict()
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            runs.append({"name": f"{method} {rows} x {length}", **pool.apply(measure, (settings, arguments.threads))})
        row = runs[-1]
        print(
            f"{row['name']:<14} planned {format_bytes(row['planned_bytes']):>8}  measured"
            f" {format_bytes(row['measured_bytes']):>8}  ratio {row['ratio']:.3f}"
            f"{'' if abs(row['ratio'] - 1) <= TARGET else '  <- off by more than 10 %'}",
            flush=True,
        )
    worst = max(abs(row["ratio"] - 1) for row in runs)
    print(f"worst error {worst:.1%}; the target is {TARGET:.0%}")
    figures = {
        "benchmark": "plan", "date": datetime.date.today().isoformat(), "runs": runs, "worst_error": worst,
        "versions": versions(), "machine": machine(),
    }  # fmt: skip
    if arguments.fit:
        libraries, share = fitted(runs)
        figures["fit"] = {"LIBRARIES_BYTES": libraries, "HEAP_SHARE": share}
        print(f"LIBRARIES_BYTES = {libraries:_.0f}\nHEAP_SHARE = {share:.2f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if arguments.page is not None:
        arguments.page.write_text(page(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
