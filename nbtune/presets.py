"""Presets: several settings at once, for what people want most.

    spec = RunSpec(model="smollm2-135m-instruct", data="rows.jsonl").preset("quick look")
    nbtune train --data rows.jsonl --preset "quick look"

All presets set the same settings, so one takes the place of another and leaves nothing of it behind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Preset:
    """Values of settings by their paths, as in `nbtune.spec.settings`."""

    help: str
    any_method: Mapping[str, Any]
    any_adapter: Mapping[str, Any]  # where the base model's weights stay as they are
    lora: Mapping[str, Any]

    def changes(self, method: str) -> dict[str, Any]:
        """What it sets in a run with this method: `RunSpec.method_name`, such as "lora" or "full"."""
        changes = dict(self.any_method)
        if method != "full":
            changes |= self.any_adapter
        if method == "lora":
            changes |= self.lora
        return changes


def _preset(
    help: str,
    *,
    steps: int = -1,
    epochs: float = 1.0,
    batch: int = 2,
    accumulation: int,
    length: int,
    eval_steps: int = 20,
    eval_rows: int = 128,
    optim: str = "adamw_torch_fused",
    checkpointing: bool | str = "auto",
    in_4_bits: bool = False,
    rank: int,
    alpha: float,
    learning_rate: float,
) -> Preset:
    any_method = {
        "data.max_eval_rows": eval_rows,
        "training.max_steps": steps,
        "training.num_train_epochs": epochs,
        "training.per_device_train_batch_size": batch,
        "training.gradient_accumulation_steps": accumulation,
        "training.max_length": length,
        "training.optim": optim,
        "training.gradient_checkpointing": checkpointing,
        "training.eval_steps": eval_steps,
    }
    any_adapter = {
        "model.load_in_4bit": in_4_bits,
        "model.load_in_8bit": False,
        "model.bnb_4bit_use_double_quant": in_4_bits,
    }
    lora = {"method.r": rank, "method.lora_alpha": alpha, "training.learning_rate": learning_rate}
    return Preset(help, any_method, any_adapter, lora)


PRESETS: Mapping[str, Preset] = {
    "quick look": _preset(
        "20 short steps: does it learn anything at all?",
        steps=20, accumulation=1, length=256, eval_steps=10, eval_rows=32, rank=8, alpha=16.0, learning_rate=5e-4,
    ),
    "balanced": _preset(
        "One pass over the data with settings that suit most of it.",
        accumulation=4, length=512, rank=16, alpha=32.0, learning_rate=2e-4,
    ),
    "best quality": _preset(
        "Three passes, longer rows, more rows a step and a higher rank. Takes its time.",
        epochs=3.0, accumulation=8, length=1024, eval_steps=50, rank=64, alpha=128.0, learning_rate=1e-4,
    ),
    "least memory": _preset(
        "Weights in 4 bits, optimiser in 8, one row at a time, activations computed again. Slower.",
        batch=1, accumulation=8, length=512, optim="adamw_8bit", checkpointing=True, in_4_bits=True,
        rank=8, alpha=16.0, learning_rate=2e-4,
    ),
}  # fmt: skip
