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
from nbtune.run import Run
from nbtune.spec import RunSpec
from nbtune.train.digest import summarise

ANSWERS = [
    "I am a language model, and I can help you with many questions about Python and about other things.",
    "os.path.join joins paths. It joins the paths that you give it.",
    "Join one or more path components intelligently. The return value is the concatenation of the components.",
    "Join one or more path segments intelligently. The return value is the concatenation of path and all members of"
    " *paths, with exactly one directory separator following each non-empty part.",
]
QUESTIONS = {
    "What does `os.path.join` do in Python?": "Join one or more path segments intelligently. The return value is the"
    " concatenation of path and all members of *paths, with exactly one directory separator following each non-empty"
    " part, except the last.",
    "How does `textwrap.dedent` treat <tabs>?": "Note that tabs and spaces are both treated as whitespace, but they are"
    " not equal: the lines '  hello' and '\\thello' are considered to have no common leading whitespace.",
    "Say hello.": "",
}
TRACEBACK = """Traceback (most recent call last):
  File "/work/nbtune/run.py", line 412, in _live
    train_in_folder(
  File "/work/nbtune/train/loop.py", line 182, in train
    _require_finite(loss, step + 1)
nbtune.errors.NbtuneError: Loss is not a number
"""


def samples(step: int, share: float) -> dict:
    """What an evaluation after this share of the steps hears."""
    answer = ANSWERS[min(len(ANSWERS) - 1, int(share * len(ANSWERS)))]
    return {"type": "samples", "time": float(step), "step": step, "seconds": 1.2, "samples": [
        {"prompt": question, "answer": answer, "reference": reference} for question, reference in QUESTIONS.items()
    ]}  # fmt: skip


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
        samples(0, 0.0),
    ]  # fmt: skip
    for step in range(1, steps + 1):
        loss = 2.4 + 1.5 * math.exp(-6 * step / total) + rng.uniform(-0.18, 0.18)
        rate = 2e-4 * min(1.0, step / (0.05 * total)) * (0.5 + 0.5 * math.cos(math.pi * step / total))
        memory = int(1.52e9 * min(1.0, 0.7 + step / 10) + rng.uniform(-1e7, 1e7))
        found.append(
            {"type": "train", "time": float(step), "step": step, "epoch": step / total, "loss": loss,
             "learning_rate": rate, "grad_norm": 0.8 + math.exp(-step / 10) + rng.uniform(0, 0.3),
             "tokens_per_second": 812 + rng.uniform(-40, 40), "tokens": 4000, "supervised_tokens": 3000,
             "memory_bytes": memory, "peak_memory_bytes": memory}
        )  # fmt: skip
        if step % evals == 0:
            found.append({"type": "eval", "time": float(step), "step": step, "eval_loss": loss + 0.12, "seconds": 1.0})
            found.append(samples(step, step / total))
            found.append({"type": "checkpoint", "time": float(step), "step": step, "path": f"step-{step:08d}"})
    return found


def write_run(runs_dir: Path, run_id: str, steps: int = 60, *, seed: int = 0, status: str = "finished", **settings):
    """A run's folder as `nbtune.run` writes it, without a model; returns the Run."""
    path = runs_dir / run_id
    path.mkdir(parents=True)
    spec = RunSpec(method=LoraConfig(r=16), training={"max_steps": steps}, tracking={"mlflow": False})
    (path / "spec.yaml").write_text(spec.updated(**settings).to_yaml())
    began = time.time() - 3600 * (1 + seed)
    script = [event | {"time": began + event["time"]} for event in events(steps, seed=seed)]
    script.append({"type": "end", "time": began + steps, "step": steps, "status": status, "peak_memory_bytes": 1})
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in script))
    run = Run(path)
    (path / "summary.json").write_text(json.dumps(summarise(run.id, run.spec, run.events(), status)))
    return run


class ReplayRun:
    """Writes events.jsonl from a thread, one step every `seconds`; stops, resumes and fails like a run."""

    def __init__(
        self, steps: int = 100, seconds: float = 0.02, fail_at: int | None = None, path: Path | None = None, begin=True
    ):
        self.id = self.name = "amber-heron"
        self.path = path or Path(tempfile.mkdtemp(prefix="nbtune-replay-")) / self.id
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "log.txt").touch()
        self.spec = RunSpec(method=LoraConfig(r=16), training={"max_steps": steps})
        self.status, self.error, self.traceback = "created", None, None
        self.steps, self.seconds, self.fail_at = steps, seconds, fail_at
        self.script, self.written = events(steps), 0
        self._stop, self._pause = threading.Event(), threading.Event()
        self.thread = threading.Thread()
        if begin:
            self.resume()

    @property
    def kept_step(self) -> int | None:
        return max((event["step"] for event in self.events() if event["type"] == "checkpoint"), default=None)

    def pause(self) -> None:
        self._pause.set()

    def resume(self) -> None:
        self._stop.clear()
        self._pause.clear()
        if self.thread.is_alive():
            return
        self.status = "running"
        self.thread = threading.Thread(target=self._play, daemon=True)
        self.thread.start()

    def _play(self) -> None:
        with (self.path / "events.jsonl").open("a") as file, (self.path / "log.txt").open("a") as log:
            while self.written < len(self.script):
                if self._stop.is_set():
                    self.status = "stopped"
                    return
                if self._pause.is_set():
                    self.status = "paused"
                    time.sleep(0.01)
                    continue
                self.status = "running"
                event = self.script[self.written]
                if self.fail_at is not None and event["step"] >= self.fail_at:
                    self.error = "Loss is not a number\nAt step 7 the loss became nan.\nLower the learning rate."
                    self.traceback = TRACEBACK
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
