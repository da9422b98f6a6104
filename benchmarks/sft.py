"""Fine-tuning end to end on instructions: nbtune's training run beside TRL's SFTTrainer with peft.

    NBTUNE_SAMPLE_DATA=... uv run python benchmarks/sft.py           # about 12 minutes on two cores
    uv run python benchmarks/sft.py --data rows.json --rounds 6      # alpaca rows: instruction, input, output

SmolLM2-135M-Instruct, LoRA r=16 on all linear layers, max_length 512, loss on the answers only, on every side the same
tokens and labels. A round is one optimiser step of about 1,000 real (not padding) tokens, timed with all that belongs
to it; loading and tokenising come before. Memory is the process's whole peak. The sides:

    nbtune        `nt.train`'s own session: bf16, 2 packed rows a step
    trl default   SFTTrainer given the model's folder: weights in the checkpoint's dtype (--checkpoint-dtype), bf16
                  autocast, gradient checkpointing, batches of 8 at random, padded
    trl packed    what its documentation advises, tuned for a CPU: bf16 weights and autocast, no checkpointing, packing
                  without padding; nbtune's very rows, order and first weights, so that the loss curves must agree
    trl grouped   the same with batches of 8 examples of like length instead of packing

The ratios are seconds a real token over ours. `best_tuned` is the quicker of the last two. Fails where a gradient is
zero, or where nbtune and `trl packed` differ in tokens, or in loss by more than 1 %.
"""

from __future__ import annotations

import itertools
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _lora import MODEL, SETTINGS, folder, step_flops, touch
from _report import finish, parser
from _side_by_side import Side, Values, compare, paced

MAX_LENGTH, LEARNING_RATE, ROWS, BATCH = 512, 1e-4, 2, 8
Rows = Sequence[dict[str, list[int]]]

# Tried on a CPU with bf16 weights, CPU time a packed token: autocast, which is SFTConfig's default, 8.5 ms; without it
# 10.3, with bf16 adapters 9.1, and with both rows in one forward pass, whose mask is dense, 11.4.
TUNED = {"gradient_checkpointing": False, "train_sampling_strategy": "sequential"}
PACKED = {**TUNED, "packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS}


def ours(spec: dict[str, Any], run: Path, flops_per_token: float) -> Iterator[Values]:
    from nbtune.spec import RunSpec
    from nbtune.train.session import train_in_folder

    def work(report: Callable[[Values], None]) -> None:
        def on_event(event: dict[str, Any]) -> None:
            if event["type"] == "start":
                report({"trained_parameters": event["trainable_parameters"]})
            if event["type"] == "train":
                found = {name: event[name] for name in ("loss", "grad_norm", "tokens")}
                report({**found, "flops": event["tokens"] * flops_per_token})

        train_in_folder(run, RunSpec.from_dict(spec), on_event=on_event, should_stop=lambda: False)

    return paced(work)


def theirs(
    model: str,
    dtype: str,
    rows: Rows,
    settings: dict[str, Any],
    steps: int,
    flops_per_token: float,
    first: Path | None = None,
) -> Iterator[Values]:
    """`first`: an adapter to begin with; without it the trainer makes one, of other random numbers."""
    import peft
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
    from transformers.utils.logging import disable_progress_bar
    from trl import SFTConfig, SFTTrainer

    disable_progress_bar()
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    touch(base)
    if first is not None:
        base = peft.PeftModel.from_pretrained(base, first, is_trainable=True)

    def work(report: Callable[[Values], None]) -> None:
        class Pace(TrainerCallback):
            seen = 0

            def on_train_begin(self, *_: Any, **__: Any) -> None:
                report({})

            def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
                tokens, self.seen = int(logs["num_tokens"]) - self.seen, int(logs["num_tokens"])
                found = {"loss": logs["loss"], "grad_norm": logs["grad_norm"], "tokens": tokens}
                report({**found, "flops": tokens * flops_per_token})

        with tempfile.TemporaryDirectory() as output:
            arguments = SFTConfig(
                output_dir=output,
                max_steps=steps,
                max_length=MAX_LENGTH,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=not torch.cuda.is_available(),
                disable_tqdm=True,
                dataset_kwargs={"skip_prepare_dataset": True},  # the rows are tokenised, labelled and cut
                **settings,
            )
            trainer = SFTTrainer(
                base,
                args=arguments,
                train_dataset=Dataset.from_list(list(rows)),
                peft_config=peft.LoraConfig(**SETTINGS) if first is None else None,
                callbacks=[Pace()],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()

    return paced(work)


class Work:
    """The examples, and the steps that nbtune makes of them."""

    def __init__(self, model: str, data: Path, steps: int) -> None:
        from nbtune.data import load_examples
        from nbtune.models import load_tokenizer
        from nbtune.spec import RunSpec

        self.spec = RunSpec(
            model={"name": model, "dtype": "bfloat16"},  # pyright: ignore[reportArgumentType]
            data={"source": str(data), "eval_fraction": 0.0},  # pyright: ignore[reportArgumentType]
            method={"peft_type": "LORA", **SETTINGS},  # pyright: ignore[reportArgumentType]
            training={  # pyright: ignore[reportArgumentType]
                "max_steps": steps,
                "max_length": MAX_LENGTH,
                "per_device_train_batch_size": ROWS,
                "gradient_accumulation_steps": 1,
                "learning_rate": LEARNING_RATE,
                "lr_scheduler_type": "constant",
                "eval_steps": 0,
                "save_steps": 0,
            },
            tracking={"mlflow": False},  # pyright: ignore[reportArgumentType]
        )
        self._steps = steps
        self._examples = load_examples(self.spec.data, load_tokenizer(self.spec.model), MAX_LENGTH).train

    def alone(self) -> Rows:
        """Every example as a row."""
        return [{"input_ids": e.input_ids.tolist(), "labels": e.labels.tolist()} for e in self._examples]

    def grouped(self) -> Rows:
        """Every example as a row, ordered so that batches are of like length and come in any order of lengths."""
        rows = sorted(self.alone(), key=lambda row: len(row["input_ids"]))
        batches = [rows[start : start + BATCH] for start in range(0, len(rows) - BATCH + 1, BATCH)]
        random.Random(0).shuffle(batches)  # noqa: S311 - an order, not a secret
        return [row for batch in batches for row in batch]

    def packed(self) -> Rows:
        """The packed rows of nbtune's steps, in their order."""
        from nbtune.data import Batches, collate

        batches = Batches(self._examples, ROWS, MAX_LENGTH, packing=True, seed=self.spec.training.seed).epoch(0)
        rows = []
        for indices in itertools.chain.from_iterable(batches[: self._steps]):
            row = [self._examples[index] for index in indices]
            flat = collate([row])
            tokens, labels = flat.input_ids[0].tolist(), flat.labels[0].tolist()
            rows.append({"input_ids": tokens, "labels": labels, "seq_lengths": [len(example) for example in row]})
        return rows

    def flops_per_token(self, config: Any) -> float:
        """Model FLOP of a token, the mean over the examples."""
        lengths = [len(example) for example in self._examples]
        labelled = sum(int((example.labels != -100).sum()) for example in self._examples)
        return step_flops(config, lengths, labelled) / sum(lengths)

    def save_first_weights(self, target: Path) -> None:
        """The adapter that nbtune's session begins with."""
        from nbtune.models import attach_adapter, load

        loaded = load(self.spec.model)
        torch.manual_seed(self.spec.training.seed)
        attach_adapter(loaded.model, self.spec).save_pretrained(target)


def main(arguments: Sequence[str] | None = None) -> None:
    samples = os.environ.get("NBTUNE_SAMPLE_DATA", ".")
    options = parser(__doc__, rounds=12)
    options.add_argument("--data", type=Path, default=Path(samples) / "alpaca_en_demo.json", help="rows to train on")
    options.add_argument("--model", default=MODEL, help="a model that nbtune can load")
    options.add_argument(
        "--checkpoint-dtype",
        default="float32",
        help="dtype of `trl default`'s weights; float32 is that of the packaged checkpoint, the hub's is bfloat16",
    )
    given = options.parse_args(arguments)

    from transformers import AutoConfig

    steps = 1 + given.rounds
    work, model = Work(given.model, given.data, steps), str(folder(given.model))
    with tempfile.TemporaryDirectory() as temporary:
        first, run = Path(temporary) / "first", Path(temporary) / "run"
        work.save_first_weights(first)
        run.mkdir()
        common = {"model": model, "steps": steps}
        common["flops_per_token"] = flops = work.flops_per_token(AutoConfig.from_pretrained(model))
        common_tuned = {**common, "dtype": "bfloat16"}
        default = {**common, "dtype": given.checkpoint_dtype, "rows": work.alone(), "settings": {}}
        packed = {**common_tuned, "rows": work.packed(), "settings": PACKED, "first": first}
        grouped = {**common_tuned, "rows": work.grouped(), "settings": TUNED}
        sides = [
            Side("nbtune", ours, {"spec": work.spec.to_dict(), "run": run, "flops_per_token": flops}),
            Side("trl default", theirs, default),
            Side("trl packed", theirs, packed),
            Side("trl grouped", theirs, grouped),
        ]
        comparison = compare(sides, rounds=given.rounds, warmup=1, threads=given.threads, apart=not given.one_process)

    same = [side for side in comparison.rivals if side.name == "trl packed"]
    comparison.require_positive("grad_norm")
    comparison.require_same("tokens", same)
    comparison.require_close("loss", 0.01, same)
    best = max(comparison.rivals[1:], key=lambda side: side.per_second("tokens"))
    finish(
        "sft",
        comparison,
        given,
        whole_memory=True,
        best_tuned={
            "name": best.name,
            "speed_ratio": comparison.speed_ratio(best),
            "memory_ratio": comparison.memory_ratio(best, whole=True),
        },
        loss_deviation=comparison.deviation("loss", same[0]),
    )


if __name__ == "__main__":
    main()
