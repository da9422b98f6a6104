"""One training step on dense blocks of 4 x 256 tokens, nbtune beside transformers and peft.

    uv run python benchmarks/step.py                      # bf16, about 3 minutes on two cores
    uv run python benchmarks/step.py --dtype float32      # about 5 minutes
    uv run python benchmarks/step.py --json step.json --page step.html

SmolLM2-135M-Instruct, LoRA r=16 on all linear layers, fp32 adapters of the same first weights, fused AdamW at 1e-4,
gradients clipped to 1. Other text in every step. Forward pass, backward pass, clipping and the update are timed.
Peft's side is what its users run: `get_peft_model` at its defaults, sdpa attention, `model(input_ids, labels).loss`.
Fails where the data differ, a gradient is zero, or a loss is more than 1 % from peft's.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from _lora import MODEL, SETTINGS, first_weights, folder, step_flops, touch, trained
from _report import finish, parser
from _side_by_side import Side, Values, compare

LEARNING_RATE, MAX_GRAD_NORM = 1e-4, 1.0


def ours(model: str, dtype: str, blocks: np.ndarray) -> Iterator[Values]:
    """A step as nbtune's session and loop take it."""
    from nbtune.data import Example, collate
    from nbtune.fused import fused
    from nbtune.kernels.casts import casts_kept
    from nbtune.models import load
    from nbtune.peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from nbtune.spec import ModelSpec
    from nbtune.train.loss import CausalLMLoss
    from nbtune.train.memory import trim_heap

    loaded = load(ModelSpec(name=model, dtype=dtype), for_training=True)  # pyright: ignore[reportArgumentType]
    adapted = get_peft_model(loaded.model, LoraConfig(**SETTINGS))
    set_peft_model_state_dict(adapted, first_weights(get_peft_model_state_dict(adapted)))
    loss_model = CausalLMLoss(loaded.model).train()
    parameters = trained(loss_model)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    with fused(loaded.model) as layers:
        yield {**_ready(loaded.model), "fused": dict(layers.counts)}
        for block in blocks:
            batch = collate([[Example(row, row)] for row in block]).to(loaded.device)
            with casts_kept():
                loss = loss_model(
                    batch.input_ids, batch.labels, batch.position_ids, batch.cu_seq_lens, batch.max_length
                ).loss
                loss.backward()
            if loaded.device.type == "cpu":
                trim_heap()
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            yield _came_to(loss, grad_norm, block, loaded.model)


def theirs(model: str, dtype: str, blocks: np.ndarray) -> Iterator[Values]:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa")
    base.to(device).config.use_cache = False
    adapted = get_peft_model(base, LoraConfig(**SETTINGS))
    set_peft_model_state_dict(adapted, first_weights(get_peft_model_state_dict(adapted)))
    adapted.train()
    parameters = trained(adapted)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    yield _ready(base)
    for block in blocks:
        input_ids = torch.from_numpy(block).long().to(device)
        loss = adapted(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        yield _came_to(loss, grad_norm, block, base)


def _ready(model: Any) -> Values:
    touch(model)
    return {"trained_parameters": sum(parameter.numel() for parameter in trained(model))}


def _came_to(loss: torch.Tensor, grad_norm: torch.Tensor, block: np.ndarray, model: Any) -> Values:
    rows, length = block.shape
    return {
        "loss": float(loss.detach()),
        "grad_norm": float(grad_norm),
        "tokens": block.size,
        "flops": step_flops(model.config, rows * [length], rows * (length - 1)),
        "data": f"{zlib.crc32(block.tobytes()):08x}",
    }


def blocks_of_text(model: str, steps: int, rows: int, length: int) -> np.ndarray:
    """Tokens of the packaged stdlib-docs, cut into [steps, rows, length] int32."""
    from nbtune.data import load_examples
    from nbtune.models import load_tokenizer
    from nbtune.spec import DataSpec, ModelSpec

    needed = steps * rows * length
    data = DataSpec(max_rows=100 + needed // 30)  # of about 60 tokens each
    examples = load_examples(data, load_tokenizer(ModelSpec(name=model)), max_length=512).train
    tokens = np.concatenate([example.input_ids for example in examples])
    return tokens[:needed].reshape(steps, rows, length)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, rounds=10)
    options.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options.add_argument("--model", default=MODEL, help="a model that nbtune can load")
    options.add_argument("--batch", type=int, default=4, help="rows of a step")
    options.add_argument("--length", type=int, default=256, help="tokens of a row")
    given = options.parse_args(arguments)

    blocks = blocks_of_text(given.model, 1 + given.rounds, given.batch, given.length)
    common = {"dtype": given.dtype, "blocks": blocks}
    sides = [
        Side("nbtune", ours, {"model": given.model, **common}),
        Side("peft", theirs, {"model": str(folder(given.model)), **common}),
    ]
    comparison = compare(sides, rounds=given.rounds, warmup=1, threads=given.threads, apart=not given.one_process)
    comparison.require_same("data")
    comparison.require_positive("grad_norm")
    comparison.require_close("loss", 0.01)
    finish(
        "step",
        comparison,
        given,
        dtype=given.dtype,
        loss_deviation=comparison.deviation("loss", comparison.rivals[0]),
    )


if __name__ == "__main__":
    main()
