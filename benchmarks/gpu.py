"""LoRA steps of a Llama of 1.2 billion weights on a GPU, nbtune beside peft; Triton kernels beside torch.

    python benchmarks/gpu.py --json gpu.json                  # a few minutes
    python benchmarks/gpu.py --tiny --device cpu              # seconds: that it runs

Needs torch, transformers, peft, accelerate and triton, and this checkout; nbtune need not be installed, nor a model be
there: weights are random, rows of 2,048 tokens are drawn from a skewed distribution, which LoRA learns within the run.
bf16 weights, fp32 adapters of the same first weights, LoRA r=16 on all linear layers, fused AdamW at 2e-3, gradients
clipped to 1. Forward pass, backward pass, clipping and the update are timed; sides run in turns.

Peft's side is a loop as a tuned trainer has it: autocast, flash attention (the flash_attn package if there is one, else
torch's), a loss in chunks that never has all logits, with and without gradient checkpointing. nbtune runs with its
blocks fused, and once more with checkpoints offloaded to the host. Fails where the data differ, a gradient is zero, or
a loss is more than 1 % from peft's.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[1])]  # nbtune, which need not be installed
from _lora import SETTINGS, first_weights, step_flops, trained  # noqa: E402
from _report import finish, parser  # noqa: E402
from _side_by_side import Side, Values, compare  # noqa: E402

LEARNING_RATE, MAX_GRAD_NORM = 2e-3, 1.0
LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
CHUNK = 1024  # rows of the peft side's loss


def llama(sizes: Mapping[str, int], device: str, dtype: str, attention: str) -> Any:
    """The same random weights on every side; the output head is the embedding."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**sizes, tie_word_embeddings=True, max_position_embeddings=8192, use_cache=False)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)


def ours(
    sizes: Mapping[str, int], device: str, dtype: str, blocks: np.ndarray, checkpointed: bool = False
) -> Iterator[Values]:
    from nbtune.fused import fused
    from nbtune.kernels import attention
    from nbtune.modules.checkpointing import blocks_of, checkpoint_blocks
    from nbtune.modules.offload import CudaLane, offloaded_checkpoints
    from nbtune.peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from nbtune.train.loss import CausalLMLoss

    model = llama(sizes, device, dtype, "sdpa")
    attention.register()
    model.set_attn_implementation(attention.NAME)
    adapted = get_peft_model(model, LoraConfig(**SETTINGS))
    set_peft_model_state_dict(adapted, first_weights(get_peft_model_state_dict(adapted)))
    checkpoint_blocks(model, len(blocks_of(model)) if checkpointed else 0)
    loss_model = CausalLMLoss(model).train()
    parameters = trained(loss_model)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    with ExitStack() as stack:
        counts = dict(stack.enter_context(fused(model)).counts)
        if checkpointed and device == "cuda":
            stack.enter_context(offloaded_checkpoints(model, CudaLane(torch.device(device, 0))))
        yield _ready(parameters, f"nbtune, fused {counts}")
        for block in blocks:
            rows, length = block.shape
            input_ids = torch.from_numpy(block).long().view(1, -1).to(device)
            labels = input_ids.clone()
            labels[0, ::length] = -100
            positions = torch.arange(length, device=device).repeat(rows)[None]
            borders = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
            loss = loss_model(input_ids, labels, positions, borders, length).loss
            yield _step(loss, parameters, optimizer, block, model)


def theirs(
    sizes: Mapping[str, int], device: str, dtype: str, blocks: np.ndarray, checkpointed: bool = False
) -> Iterator[Values]:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    flash = device == "cuda" and importlib.util.find_spec("flash_attn") is not None
    attention = "flash_attention_2" if flash else "sdpa"
    model = llama(sizes, device, dtype, attention)
    adapted = get_peft_model(model, LoraConfig(**SETTINGS))
    set_peft_model_state_dict(adapted, first_weights(get_peft_model_state_dict(adapted)))
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    adapted.train()
    parameters = trained(adapted)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    half = getattr(torch, dtype)
    yield _ready(parameters, f"peft, {attention}")
    for block in blocks:
        input_ids = torch.from_numpy(block).long().to(device)
        with torch.autocast(device, half) if half != torch.float32 else nullcontext():
            hidden = model.model(input_ids=input_ids).last_hidden_state
            loss = _chunked_loss(hidden[:, :-1].flatten(0, 1), model.lm_head, input_ids[:, 1:].flatten())
        yield _step(loss, parameters, optimizer, block, model)


def _chunked_loss(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """The mean cross-entropy; the logits of a chunk are made again in the backward pass."""
    from torch.nn.functional import cross_entropy
    from torch.utils.checkpoint import checkpoint

    def of_chunk(x: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(head(x).float(), target, reduction="sum")

    chunks = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    losses = [checkpoint(of_chunk, x, target, use_reentrant=False) for x, target in chunks]
    return torch.stack(losses).sum() / len(targets)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _ready(parameters: list[nn.Parameter], what: str) -> Values:
    print(f"ready: {what}", flush=True)
    return {"trained_parameters": sum(parameter.numel() for parameter in parameters)}


def _step(
    loss: Tensor, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, block: np.ndarray, model: Any
) -> Values:
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    rows, length = block.shape
    return {
        "loss": float(loss.detach()),
        "grad_norm": float(grad_norm),
        "tokens": block.size,
        "flops": step_flops(model.config, rows * [length], rows * (length - 1)),
        "data": f"{zlib.crc32(block.tobytes()):08x}",
    }


def drawn_blocks(vocabulary: int, steps: int, rows: int, length: int) -> np.ndarray:
    """Tokens [steps, rows, length] int32 of which few are frequent, as in text."""
    generator = np.random.default_rng(0)
    names = generator.permutation(vocabulary)
    ranks = (vocabulary ** generator.random((steps, rows, length))).astype(np.int64) - 1  # probability ~ 1 / rank
    return names[ranks].astype(np.int32)


def kernels(sizes: Mapping[str, int], tokens: int, device: str, dtype: str) -> list[dict[str, Any]]:
    """Milliseconds of each kernel's forward and backward pass: in torch, and its Triton twin where that runs."""
    from nbtune.kernels import gated, linear_cross_entropy, rms_norm, rope
    from nbtune.kernels.triton import use_triton

    width, inner, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"]
    half, head = getattr(torch, dtype), sizes["hidden_size"] // sizes["num_attention_heads"]
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=half, requires_grad=True)

    x, gate, up = random(tokens, width), random(tokens, inner), random(tokens, inner)
    weight = random(width).detach()
    query, key = random(1, heads, tokens, head), random(1, sizes["num_key_value_heads"], tokens, head)
    angles = torch.rand(1, tokens, head, device=device)
    cosines, sines = angles.cos().to(half), angles.sin().to(half)
    vocabulary_weight = random(sizes["vocab_size"], width).detach()
    labels = torch.randint(sizes["vocab_size"], (tokens,), device=device)

    cases: list[tuple[str, Any, list[Tensor], Callable[[], Sequence[Tensor]]]] = [
        ("RMSNorm", rms_norm, [x], lambda: [rms_norm.rms_norm(x, weight, 1e-5)]),
        ("rotary embedding", rope, [query, key], lambda: rope.rope(query, key, cosines, sines)),
        ("SwiGLU", gated, [gate, up], lambda: [gated.gated_activation(gate, up, "silu")]),
        (
            "linear + cross-entropy",
            linear_cross_entropy,
            [x],
            lambda: [linear_cross_entropy.linear_cross_entropy(x, vocabulary_weight, labels).loss],
        ),
    ]
    found = []
    for name, module, inputs, forward in cases:
        with patch.dict(vars(module), use_triton=lambda _tensor: False):
            torch_ms = _milliseconds(forward, inputs, device)
        triton_ms = _milliseconds(forward, inputs, device) if use_triton(x) else None
        ratio = None if triton_ms is None else torch_ms / triton_ms
        found.append({"kernel": name, "torch_ms": torch_ms, "triton_ms": triton_ms, "ratio": ratio})
    return found


def _milliseconds(
    forward: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor], device: str, repeats: int = 20
) -> float:
    """The median, after some that are not counted: Triton compiles in the first."""
    times, slopes = [], [torch.ones_like(output) for output in forward()]
    for number in range(repeats + 3):
        _wait(device)
        start = time.perf_counter()
        torch.autograd.grad(forward(), inputs, slopes)
        _wait(device)
        if number >= 3:
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| forward and backward, ms | torch | Triton | torch / Triton |", "|---|---|---|---|"]
    for row in rows:
        twin = "| - | -" if row["triton_ms"] is None else f"| {row['triton_ms']:.3f} | {row['ratio']:.2f}"
        lines.append(f"| {row['kernel']} | {row['torch_ms']:.3f} {twin} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, rounds=10)
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options.add_argument("--batch", type=int, default=4, help="rows of a step")
    options.add_argument("--length", type=int, default=2048, help="tokens of a row")
    options.add_argument("--tiny", action="store_true", help="a model of three small layers, rows of 64 tokens")
    given = options.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no CUDA device. `--tiny --device cpu` shows that the benchmark runs.")
    sizes = TINY if given.tiny else LARGE
    length = min(given.length, 64) if given.tiny else given.length

    print("Triton kernels beside torch", flush=True)
    micro = kernels(sizes, given.batch * length, given.device, given.dtype)
    print(_table(micro), flush=True)
    if given.device == "cuda":
        torch.cuda.empty_cache()

    blocks = drawn_blocks(sizes["vocab_size"], 2 + given.rounds, given.batch, length)
    common = {"sizes": sizes, "device": given.device, "dtype": given.dtype, "blocks": blocks}
    sides = [
        Side("nbtune", ours, common),
        Side("peft", theirs, common),
        Side("peft, checkpointing", theirs, {**common, "checkpointed": True}),
        Side("nbtune, checkpoints offloaded", ours, {**common, "checkpointed": True}),
    ]
    print(f"{len(sides)} sides, {2 + given.rounds} steps each of {given.batch} x {length} tokens", flush=True)
    comparison = compare(
        sides,
        rounds=given.rounds,
        warmup=2,
        threads=given.threads,
        device=given.device,
        dtypes=(given.dtype,),
        apart=not given.one_process,
    )
    comparison.require_same("data")
    comparison.require_positive("grad_norm")
    comparison.require_close("loss", 0.01)
    finish(
        "gpu",
        comparison,
        given,
        dtype=given.dtype,
        loss_deviation={side.name: comparison.deviation("loss", side) for side in comparison.rivals},
        losses={side.name: [values["loss"] for values in side.values] for side in comparison.sides},
        kernels=micro,
        gpu=torch.cuda.get_device_name() if given.device == "cuda" else None,
    )


if __name__ == "__main__":
    main()
