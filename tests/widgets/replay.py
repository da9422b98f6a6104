"""A run that replays events into a folder, at any speed: what the views are developed and tested with."""

from __future__ import annotations

import json
import math
import random
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from nbtune.peft import LoraConfig
from nbtune.spec import RunSpec


@dataclass
class Progress:
    step: int
    total_steps: int
    eta_seconds: float | None
    tokens_per_second: float | None
    message: str = ""


def events(steps: int = 100, total: int | None = None, seed: int = 0, evals: int = 20) -> list[dict]:
    """What a run of `steps` steps writes, with realistic numbers."""
    rng, total = random.Random(seed), total or steps
    found = [
        {"type": "start", "time": 0.0, "step": 0, "total_steps": total, "planned_peak_bytes": 1_600_000_000,
         "trainable_parameters": 2_949_120, "model": "smollm2-135m-instruct", "method": "lora", "device": "cpu"},
        {"type": "eval", "time": 0.5, "step": 0, "eval_loss": 3.73, "seconds": 1.0},
    ]  # fmt: skip
    for step in range(1, steps + 1):
        loss = 2.4 + 1.5 * math.exp(-6 * step / total) + rng.uniform(-0.18, 0.18)
        rate = 2e-4 * min(1.0, step / (0.05 * total)) * (0.5 + 0.5 * math.cos(math.pi * step / total))
        memory = int(1.52e9 * min(1.0, 0.7 + step / 10) + rng.uniform(-1e7, 1e7))
        found.append(
            {"type": "train", "time": float(step), "step": step, "epoch": step / total, "loss": loss,
             "learning_rate": rate, "grad_norm": 0.8 + math.exp(-step / 10) + rng.uniform(0, 0.3),
             "tokens_per_second": 812 + rng.uniform(-40, 40), "supervised_tokens": 3000,
             "memory_bytes": memory, "peak_memory_bytes": memory}
        )  # fmt: skip
        if step % evals == 0:
            found.append({"type": "eval", "time": float(step), "step": step, "eval_loss": loss + 0.12, "seconds": 1.0})
    return found


class ReplayRun:
    """Writes events.jsonl from a thread, one step every `seconds`; stops, resumes and fails like a run."""

    def __init__(
        self, steps: int = 100, seconds: float = 0.02, fail_at: int | None = None, path: Path | None = None, begin=True
    ):
        self.id = "amber-heron"
        self.path = path or Path(tempfile.mkdtemp(prefix="nbtune-replay-")) / self.id
        self.path.mkdir(parents=True, exist_ok=True)
        self.spec = RunSpec(method=LoraConfig(r=16), training={"max_steps": steps})
        self.status, self.error = "created", None
        self.steps, self.seconds, self.fail_at = steps, seconds, fail_at
        self.script, self.written = events(steps), 0
        self._stop = threading.Event()
        self.thread = threading.Thread()
        if begin:
            self.resume()

    def resume(self) -> None:
        self._stop.clear()
        self.status = "running"
        self.thread = threading.Thread(target=self._play, daemon=True)
        self.thread.start()

    def _play(self) -> None:
        with (self.path / "events.jsonl").open("a") as file, (self.path / "log.txt").open("a") as log:
            while self.written < len(self.script):
                if self._stop.is_set():
                    self.status = "stopped"
                    return
                event = self.script[self.written]
                if self.fail_at is not None and event["step"] >= self.fail_at:
                    self.error = "Loss is not a number\nAt step 7 the loss became nan.\nLower the learning rate."
                    self.status = "failed"
                    return
                file.write(json.dumps(event) + "\n")
                file.flush()
                log.write(f"step {event['step']} {event['type']}\n")
                log.flush()
                self.written += 1
                if event["type"] == "train":
                    time.sleep(self.seconds)
        self.status = "finished"

    def events(self) -> list[dict]:
        return self.script[: self.written]

    def progress(self) -> Progress:
        step = max((event["step"] for event in self.events()), default=0)
        return Progress(
            step, self.steps, (self.steps - step) * self.seconds, 812.0, "" if step else "loading the model"
        )

    def stop(self) -> None:
        self._stop.set()

    def wait(self, timeout: float | None = None) -> None:
        self.thread.join(timeout)
        if self.error:
            raise RuntimeError(self.error)

    def log_tail(self, n: int) -> str:
        return "\n".join((self.path / "log.txt").read_text().splitlines()[-n:])

    def summary(self) -> dict:
        losses = [event["eval_loss"] for event in self.events() if event["type"] == "eval"]
        return {
            "status": self.status,
            "eval_loss_before": losses[0],
            "eval_loss_after": losses[-1],
            "train_tokens_per_second": 812.0,
            "planned_peak_bytes": 1_600_000_000,
            "measured_peak_bytes": 1_530_000_000,
            "trainable_parameters": 2_949_120,
        }
