"""Eight methods, each trained for 30 steps on the real 135M model; a table of what each did to the held-out loss.

uv run python benchmarks/methods.py                # all, about 25 minutes on two cores
uv run python benchmarks/methods.py lora ia3       # some
uv run python benchmarks/methods.py --steps 60
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import nbtune as nt

# The method's settings, its learning rate, and settings of the base model.
METHODS = {
    "lora": (nt.LoraConfig(r=16, target_modules="all-linear"), 5e-4, {}),
    "qlora": (nt.LoraConfig(r=16, target_modules="all-linear"), 5e-4, {"load_in_4bit": True}),
    "adalora": (
        nt.AdaLoraConfig(
            init_r=12, target_r=8, lora_alpha=96, tinit=5, tfinal=10, deltaT=5, target_modules="all-linear"
        ),
        3e-3,
        {},
    ),
    "ia3": (nt.IA3Config(), 1e-2, {}),
    "prompt": (nt.PromptTuningConfig(num_virtual_tokens=16, prompt_tuning_init="SAMPLE_VOCAB"), 3e-2, {}),
    "prefix": (nt.PrefixTuningConfig(num_virtual_tokens=16), 2e-2, {}),
    "gralora": (nt.GraloraConfig(r=16, target_modules="all-linear"), 1e-3, {}),
    "miss": (nt.MissConfig(r=32, target_modules="all-linear"), 5e-4, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=list(METHODS), help=", ".join(METHODS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=512, help="tokens of a packed row; one row a step")
    arguments = parser.parse_args()

    print("| method | trainable | held-out loss | after | change | s / step | peak GB | planned GB | adapter MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in arguments.methods:
        with tempfile.TemporaryDirectory() as folder:
            print(measured(name, arguments.steps, arguments.length, Path(folder)), flush=True)


def measured(name: str, steps: int, length: int, folder: Path) -> str:
    """Train one method; its row of the table."""
    method, learning_rate, base = METHODS[name]
    spec = nt.RunSpec(
        model={"name": "smollm2-135m-instruct", **base},
        data={"source": "stdlib-docs", "max_eval_rows": 32},
        method=method,
        training={
            "max_steps": steps,
            "max_length": length,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "learning_rate": learning_rate,
            "eval_steps": 0,
        },
        tracking={"mlflow": False},
    )
    run = nt.train(spec, runs_dir=folder)
    run.wait()
    events = run.events()
    start = next(event for event in events if event["type"] == "start")
    losses = [event["eval_loss"] for event in events if event["type"] == "eval"]
    trained = [event for event in events if event["type"] == "train"]
    seconds = (trained[-1]["time"] - trained[0]["time"]) / (len(trained) - 1)
    peak = max(event["peak_memory_bytes"] for event in trained)
    size = sum(file.stat().st_size for file in (run.path / "adapter").glob("*.safetensors"))
    change = losses[-1] / losses[0] - 1
    return (
        f"| {name} | {start['trainable_parameters']:,} | {losses[0]:.3f} | {losses[-1]:.3f} | {change:+.1%} "
        f"| {seconds:.2f} | {peak / 1e9:.2f} | {start['planned_peak_bytes'] / 1e9:.2f} | {size / 1e6:.2f} |"
    )


if __name__ == "__main__":
    main()
