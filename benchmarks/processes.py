"""One run on one process and on two (gloo, CPU): the losses, what is sent, the memory of a process and the time.

    uv run python benchmarks/processes.py            # the packaged 135M model, 4 runs
    uv run python benchmarks/processes.py --steps 8

The runs on one process have all threads; two processes share them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import nbtune as nt

TRAINING = {
    "max_length": 64, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "eval_steps": 0,
    "eval_samples": 1, "save_steps": 0, "learning_rate": 2e-4,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "LoRA, one process": {},
    "LoRA, two": {"num_processes": 2},
    "LoRA, two, base sharded": {"num_processes": 2, "sharding": "full"},
    "full, one process": {"method": "full"},
    "full, two, sharded": {"method": "full", "num_processes": 2},
}


def spec_of(steps: int, changes: dict[str, Any]) -> nt.RunSpec:
    """A run in fp32, so that losses can be compared."""
    method = {"r": 8, "lora_dropout": 0.1} if changes.get("method") != "full" else "full"
    spec = nt.RunSpec.from_dict({"model": {"dtype": "float32"}, "method": method, "training": TRAINING})
    changes = {name: value for name, value in changes.items() if name != "method"}
    rate = {"learning_rate": 1e-5} if method == "full" else {}
    return spec.updated(max_steps=steps, max_rows=200, max_eval_rows=4, **rate, **changes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", default="", help="runs whose name begins so")
    parser.add_argument("--ray", help="the Ray whose workers the processes are; 'local' starts one")
    given = parser.parse_args()
    steps = given.steps
    first: dict[str, nt.Run] = {}
    print("| | losses differ by | eval by | weights by | sent a step | planned | peak | s a step |")
    print("|---|---|---|---|---|---|---|---|")
    for name, changes in RUNS.items():
        if not name.startswith(given.only):
            continue
        with_runs = Path(tempfile.mkdtemp(prefix="nbtune-processes-"))
        ray = given.ray if "num_processes" in changes else None
        run = nt.train(spec_of(steps, changes), runs_dir=with_runs, ray=ray).wait()
        alone = first.setdefault(str(changes.get("method", "lora")), run)
        events = [event for event in run.events() if event["type"] == "train"]
        summary = run.summary()
        seconds = min(event["tokens"] / event["tokens_per_second"] for event in events)
        print(
            f"| {name} | {_furthest(_of(run, 'train', 'loss'), _of(alone, 'train', 'loss')):.1e}"
            f" | {_furthest(_of(run, 'eval', 'eval_loss'), _of(alone, 'eval', 'eval_loss')):.1e}"
            f" | {_weights_differ(run, alone):.1e} | {events[0].get('sent_bytes', 0):,}"
            f" | {summary['planned_peak_bytes'] / 1e9:.2f} GB | {summary['measured_peak_bytes'] / 1e9:.2f} GB"
            f" | {seconds:.2f} |",
            flush=True,
        )
        trained = 4 * summary["trainable_parameters"]
        print(f"  {trained:,} bytes are trained; losses {_of(run, 'train', 'loss')}", flush=True)


def _of(run: nt.Run, kind: str, field: str) -> list[float]:
    return [event[field] for event in run.events() if event["type"] == kind]


def _furthest(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def _weights_differ(run: nt.Run, other: nt.Run) -> float:
    """The largest difference of any trained weight."""
    ours, theirs = (load_file(max(r.path.glob("checkpoints/*")) / "weights.safetensors") for r in (run, other))
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


if __name__ == "__main__":
    main()
