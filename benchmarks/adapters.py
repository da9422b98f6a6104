"""Many adapters on one model, nbtune beside peft: switching, disabling, loading, a batch with eight adapters.

    uv run python benchmarks/adapters.py

A Llama of 32 blocks with 224 linear layers of 256 features, fp32, one thread. The least of several timings: the
machine may be busy, and the ratio of two that were taken together is what counts.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import nbtune.peft as ours

ADAPTERS, ROWS = 64, 8


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 32, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).eval()


def least(run: Callable[[], Any], times: int = 15) -> float:
    """Seconds."""
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def measured(library: Any, folder: Path, adapters: int) -> dict[str, float]:
    """Milliseconds of everything, for one library with this many adapters."""
    settings = {"r": 8, "target_modules": "all-linear", "init_lora_weights": False}
    model = library.get_peft_model(base(), library.LoraConfig(**settings), "a0").eval()
    model.save_pretrained(folder / library.__name__)
    saved = folder / library.__name__ / "a0"
    loads = []
    for number in range(1, adapters):
        start = time.perf_counter()
        model.load_adapter(saved, f"a{number}")
        loads.append(time.perf_counter() - start)
    model.eval()

    def disable() -> None:
        with model.disable_adapter():
            pass

    times = {
        "load the second": loads[0],
        "load the last (least of 3)": min(loads[-3:]),
        "set_adapter": least(lambda: [model.set_adapter("a1"), model.set_adapter("a0")]) / 2,
        "disable_adapter": least(disable, 5),
    }
    names = [f"a{number}" for number in range(ROWS)]
    for tokens in (1, 16, 64):
        ids = torch.randint(0, 512, (ROWS, tokens), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            times[f"{ROWS} rows x {tokens} tokens, one adapter"] = least(lambda ids=ids: model(input_ids=ids))
            many = least(lambda ids=ids: model(input_ids=ids, adapter_names=names))
            times[f"{ROWS} rows x {tokens} tokens, {ROWS} adapters"] = many
    return {name: 1000 * seconds for name, seconds in times.items()}


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        mine, theirs = measured(ours, Path(folder), ADAPTERS), measured(peft, Path(folder), ADAPTERS)
    print(f"| with {ADAPTERS} adapters, ms | nbtune | peft | peft / nbtune |\n|---|---|---|---|")
    for name, value in mine.items():
        print(f"| {name} | {value:.3f} | {theirs[name]:.1f} | {theirs[name] / value:.1f} |")


if __name__ == "__main__":
    main()
