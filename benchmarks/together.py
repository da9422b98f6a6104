"""Four LoRA runs of the 135M model: on one base in one process, against one after the other, each in its own.

    uv run python benchmarks/together.py                     # micro-batches of 128 tokens, bf16
    uv run python benchmarks/together.py --tokens 2048 --steps 4
    uv run python benchmarks/together.py --dtype float32     # losses must agree within 1e-5

Times are of whole processes, loading included. Fails where the losses of a run differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m-instruct"
RUNS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (  # methods, and settings of training
    ({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}, {"learning_rate": 2e-4}),
    ({"r": 8, "lora_alpha": 16}, {"learning_rate": 5e-4}),
    ({"r": 16, "lora_alpha": 16}, {"learning_rate": 1e-4}),
    ({"r": 32, "lora_alpha": 64, "target_modules": ["gate_proj", "up_proj", "down_proj"]}, {"learning_rate": 3e-4}),
)
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}  # of each loss; bf16 rounds the same sums differently


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128, help="of a micro-batch, which is a step")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--dtype", default="bfloat16", choices=list(TOLERANCE))
    parser.add_argument("--work", nargs="*", type=int, help=argparse.SUPPRESS)  # in a child: the numbers of its runs
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments)
    else:
        print(json.dumps(measure(arguments), indent=1))


def work(arguments: argparse.Namespace) -> None:
    """Train these runs in this process."""
    import nbtune as nt
    from nbtune.together import train_together

    specs = [spec(arguments, number) for number in arguments.work]
    if len(specs) == 1:
        nt.train(specs[0], runs_dir=arguments.folder, run_id=f"run-{arguments.work[0]}").wait()
        return
    ids = [f"run-{number}" for number in arguments.work]
    for run in train_together(specs, runs_dir=arguments.folder, run_ids=ids):
        run.wait()


def spec(arguments: argparse.Namespace, number: int) -> Any:
    from nbtune.spec import RunSpec

    method, training = RUNS[number]
    settings = {
        "max_steps": arguments.steps, "max_length": arguments.tokens, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1, "eval_steps": 0, "eval_samples": 0, "save_steps": 0,
    }  # fmt: skip
    return RunSpec(
        model={"name": MODEL, "dtype": arguments.dtype},
        data={"source": "stdlib-docs", "eval_fraction": 0},
        method=method,
        training=settings | training,
        tracking={"mlflow": False},
    )


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    from nbtune.plan.together import plan_together

    planned = plan_together([spec(arguments, number) for number in range(len(RUNS))], in_new_process=True)
    with tempfile.TemporaryDirectory() as folder:
        alone = [timed(arguments, [number], Path(folder) / "alone") for number in range(len(RUNS))]
        together = timed(arguments, list(range(len(RUNS))), Path(folder) / "together")
        ours, theirs = figures(Path(folder) / "together"), figures(Path(folder) / "alone")
    difference = max(abs(a - b) for mine, other in zip(ours, theirs, strict=True)
                     for a, b in zip(mine["losses"], other["losses"], strict=True))  # fmt: skip
    if difference > TOLERANCE[arguments.dtype]:
        raise SystemExit(f"a loss differs by {difference:.2g}")
    training = sum(other["seconds"] for other in theirs)
    return {
        "settings": {"tokens": arguments.tokens, "steps": arguments.steps, "dtype": arguments.dtype},
        "seconds_alone": [round(seconds, 1) for seconds in alone],
        "seconds_together": round(together, 1),
        "ratio": round(together / sum(alone), 3),
        "ratio_of_training": round(ours[0]["wall"] / training, 3),
        "planned_ratio": round(planned.ratio or 0, 3),
        "startup_seconds_alone": [round(total - one["wall"], 1) for total, one in zip(alone, theirs, strict=True)],
        "startup_seconds_together": round(together - ours[0]["wall"], 1),
        "pass_seconds_alone": [round(one["seconds"] / arguments.steps, 3) for one in theirs],
        "pass_seconds_together": round(ours[0]["wall"] / arguments.steps, 3),
        "peak_bytes": {"together": ours[0]["peak"], "planned": planned.whole.peak_bytes, "alone": theirs[0]["peak"]},
        "largest_difference_of_a_loss": difference,
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }


def timed(arguments: argparse.Namespace, numbers: list[int], folder: Path) -> float:
    """Seconds of a process that trains these runs."""
    options = ["--tokens", arguments.tokens, "--steps", arguments.steps, "--dtype", arguments.dtype]
    command = [sys.executable, __file__, *options, "--folder", folder, "--work", *numbers]
    began = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True)  # noqa: S603 - this Python, and this file
    return time.perf_counter() - began


def figures(folder: Path) -> list[dict[str, Any]]:
    """Of each run: its losses, peak memory, the sum of its steps' seconds, and those from its first to its end."""
    from nbtune.run import Run

    found = []
    for run in (Run.open(folder / f"run-{number}") for number in range(len(RUNS))):
        steps = [event for event in run.events() if event["type"] == "train"]
        seconds = [event["tokens"] / event["tokens_per_second"] for event in steps]
        found.append({
            "losses": [event["loss"] for event in steps],
            "peak": max(event["peak_memory_bytes"] for event in steps),
            "seconds": sum(seconds),
            "wall": steps[-1]["time"] - steps[0]["time"] + seconds[0],
        })  # fmt: skip
    return found


if __name__ == "__main__":
    main()
