"""A sweep's folder in the middle of its work, written as the scheduler and the runs write it, without a process."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path

import nbformat
from filelock import FileLock

from nbtune.peft import LoraConfig
from nbtune.spec import RunSpec
from nbtune.sweep.design import Design
from nbtune.sweep.ledger import Ledger
from nbtune.sweep.notebook import SweepNotebook
from nbtune.sweep.space import grid
from nbtune.sweep.sweep import IDENTITY, NOTEBOOK, Sweep

TRAIN = Path(__file__).parents[2] / "notebooks" / "train.ipynb"
SPACE = {"r": [4, 8, 16], "learning_rate": [1e-4, 3e-4, 1e-3], "method": ["lora", "loha"]}
STEPS = 60
ERROR = (
    "train.ipynb failed in cell 4\nRunError: Loss is not a number\n<b>step 23</b> of 60. Lower the learning rate."
    "\nSee 012.ipynb."
)


def held_out(point: dict, step: int) -> float:
    """What a trial's loss comes to: the learning rate matters most, the rank a little, the method hardly."""
    rate = math.log10(point["learning_rate"])
    end = 2.25 + 0.5 * (rate + 3.4) ** 2 + 0.12 * abs(math.log2(point["r"]) - 3.4) + 0.02 * (point["method"] == "loha")
    return end + (3.73 - end) * math.exp(-5 * step / STEPS)


def run_events(point: dict, steps: int, began: float, seed: int) -> list[dict]:
    rng = random.Random(seed)
    found = [
        {"type": "start", "time": began, "step": 0, "total_steps": STEPS, "eval_examples": 49},
        {"type": "eval", "time": began, "step": 0, "eval_loss": 3.73, "seconds": 1.0},
    ]
    for step in range(1, steps + 1):
        loss = held_out(point, step) + rng.uniform(-0.2, 0.1)
        found.append(
            {"type": "train", "time": began + step, "step": step, "loss": loss, "tokens": 800,
             "tokens_per_second": 800.0, "peak_memory_bytes": 1_500_000_000}
        )  # fmt: skip
        if step % 10 == 0:
            found.append({"type": "eval", "time": began + step, "step": step, "eval_loss": held_out(point, step)})
    return found


def write_events(path: Path, events: list[dict]) -> None:
    with (path / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def record(path: Path, *, ended: int = 8, running: int = 2, space: dict = SPACE, limit: int = 12) -> Sweep:
    """Write a sweep of which `ended` trials ended, the last of them badly, and `running` run at step 23."""
    path.mkdir(parents=True)
    (path / NOTEBOOK).write_text(TRAIN.read_text())
    design = Design(SweepNotebook(path / NOTEBOOK), space, {"max_steps": STEPS}, sampler="random", seed=1)
    (path / IDENTITY).write_text(json.dumps(design.identity()))
    ledger, now = Ledger(path), time.time()
    ledger.open()
    ledger.append("open")
    points = random.Random(4).sample(grid(space), min(limit, len(grid(space))))
    for number, point in enumerate(points, 1):
        refused = "the same as 3" if number == len(points) and limit == 12 else ""
        ledger.append(
            "trial", trial=number, params=point, predicted_seconds=95.0, predicted_bytes=1_620_000_000, refused=refused
        )
    for number, point in enumerate(points[: ended + running], 1):
        run = path / "runs" / f"{number:03d}-run"
        run.mkdir(parents=True)
        spec = RunSpec(method=LoraConfig(r=point["r"]), training={"max_steps": STEPS}, tracking={"mlflow": False})
        (run / "spec.yaml").write_text(spec.to_yaml())
        nbformat.write(nbformat.v4.new_notebook(), path / f"{number:03d}.ipynb")
        done = STEPS if number <= ended else 23 - 4 * (number - ended - 1)
        began = now - 60 if number > ended else now - 3000 + 200 * number
        wrong = number == ended
        write_events(run, run_events(point, 22 if wrong else done, began, seed=number))
        ledger.append("start", trial=number, attempt=1, time=began)
        if number <= ended:
            end = {"type": "end", "time": began + 100, "step": done, "status": "failed" if wrong else "finished"}
            write_events(run, [end])
            metrics = {"eval_loss_after": held_out(point, done), "train_loss": 2.4, "steps": done}
            ledger.append(
                "end", trial=number, state="failed" if wrong else "finished", run_id=run.name,
                metrics={} if wrong else metrics, error=ERROR if wrong else None, seconds=104.0 + number)  # fmt: skip
    ledger.close()
    return Sweep.open(path, jobs=2)


def hold(sweep: Sweep) -> FileLock:
    """Hold the sweep's lock, as the process does that is at it; its status is "running" until this is released."""
    lock = FileLock(sweep.path / ".lock", thread_local=False)
    lock.acquire()
    return lock


def conclude(sweep: Sweep, lock: FileLock) -> None:
    """End the trials that run, and the sweep."""
    ledger = Ledger(sweep.path)
    ledger.open()
    for trial in ledger.trials().values():
        if trial.state not in ("running", "waiting"):
            continue
        if trial.state == "running":
            write_events(trial.run_path, run_events(trial.params, STEPS, time.time() - 100, trial.number)[28:])
        metrics = {"eval_loss_after": held_out(trial.params, STEPS), "steps": STEPS}
        if trial.state == "waiting":
            ledger.append("start", trial=trial.number, attempt=1)
        end = {"state": "finished", "run_id": None, "metrics": metrics, "error": None, "seconds": 99.0}
        ledger.append("end", trial=trial.number, **end)
    ledger.append("close")
    ledger.close()
    lock.release()
