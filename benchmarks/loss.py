"""The output head and its loss alone, forward and backward: nbtune beside transformers.

    uv run python benchmarks/loss.py                      # about 3 minutes on two cores
    uv run python benchmarks/loss.py --json loss.json --page loss.html
    uv run python benchmarks/loss.py --dtype float32 --masked 0.6

1,024 hidden states of 576 features before a head of 49,152 words (SmolLM2-135M's sizes), frozen as with an adapter, in
bf16 and fp32, with no and with 60 % of the labels masked; other hidden states and labels in every round. Transformers'
side is what its models do: `ForCausalLMLoss(head(hidden), labels)`. Memory is the process's peak (on a GPU, torch's)
above what it held with the head loaded. The first case is the one that the object's own ratios are of; all are in
`cases`. Fails where the data differ, a gradient is zero, or a loss is more than 0.1 % from transformers'.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from _report import finish, parser
from _side_by_side import Comparison, Side, Values, compare
from torch import Tensor, nn


def ours(**sizes: Any) -> Iterator[Values]:
    from nbtune.kernels.linear_cross_entropy import linear_cross_entropy

    head, rounds = prepared(**sizes)
    yield {}
    for hidden, labels in rounds:
        loss = linear_cross_entropy(hidden[0, :-1], head.weight, labels[0, 1:]).loss
        loss.backward()
        yield came_to(loss, hidden, labels)


def theirs(**sizes: Any) -> Iterator[Values]:
    from transformers.loss.loss_utils import ForCausalLMLoss

    head, rounds = prepared(**sizes)
    yield {}
    for hidden, labels in rounds:
        loss = ForCausalLMLoss(head(hidden), labels, head.out_features)
        loss.backward()
        yield came_to(loss, hidden, labels)


def prepared(
    tokens: int, features: int, words: int, dtype: str, masked: float
) -> tuple[nn.Linear, Iterator[tuple[Tensor, Tensor]]]:
    """The frozen head, and endless hidden states [1, T, D] with labels [1, T], the same for both sides."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    precision = getattr(torch, dtype)
    head = nn.Linear(features, words, bias=False, dtype=precision, device=device).requires_grad_(False)
    head.weight.copy_(0.05 * torch.randn(words, features, generator=generator))

    def rounds() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            hidden = torch.randn(1, tokens, features, generator=generator)
            labels = torch.randint(words, (1, tokens), generator=generator)
            labels[torch.rand(1, tokens, generator=generator) < masked] = -100
            yield hidden.to(device, precision).requires_grad_(), labels.to(device)

    return head, rounds()


def came_to(loss: Tensor, hidden: Tensor, labels: Tensor) -> Values:
    assert hidden.grad is not None
    return {
        "loss": float(loss.detach()),
        "grad_norm": float(hidden.grad.norm()),
        "tokens": labels.numel(),
        "data": f"{zlib.crc32(labels.cpu().numpy().tobytes()):08x}",
    }


def measure(sizes: dict[str, Any], rounds: int, threads: int | None, apart: bool) -> Comparison:
    sides = [Side("nbtune", ours, sizes), Side("transformers", theirs, sizes)]
    comparison = compare(sides, rounds=rounds, warmup=2, threads=threads, dtypes=[sizes["dtype"]], apart=apart)
    comparison.require_same("data")
    comparison.require_positive("grad_norm")
    comparison.require_close("loss", 0.001)
    return comparison


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, rounds=7)
    options.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    options.add_argument("--masked", nargs="+", type=float, default=[0.6, 0.0], help="shares of the labels")
    options.add_argument("--tokens", type=int, default=1024)
    options.add_argument("--features", type=int, default=576)
    options.add_argument("--words", type=int, default=49_152)
    given = options.parse_args(arguments)

    cases = []
    for dtype in given.dtype:
        for masked in given.masked:
            sizes = {name: getattr(given, name) for name in ("tokens", "features", "words")}
            sizes |= {"dtype": dtype, "masked": masked}
            comparison = measure(sizes, given.rounds, given.threads, not given.one_process)
            cases.append((sizes, comparison))
    print("| dtype | masked | nbtune ms | transformers ms | faster | nbtune MB | transformers MB | memory |")
    print("|---|---|---|---|---|---|---|---|")
    for sizes, comparison in cases:
        print(row(sizes, comparison))
    sizes, comparison = cases[0]
    finish("loss", comparison, given, dtype=sizes["dtype"], cases=[figures(*case) for case in cases])


def figures(sizes: dict[str, Any], comparison: Comparison) -> dict[str, Any]:
    rival = comparison.rivals[0]
    return {
        **sizes,
        "speed_ratio": comparison.speed_ratio(rival),
        "memory_ratio": comparison.memory_ratio(rival),
        "loss_deviation": comparison.deviation("loss", rival),
        "seconds": [side.median_seconds for side in comparison.sides],
        "above_loaded_bytes": [side.above_bytes for side in comparison.sides],
    }


def row(sizes: dict[str, Any], comparison: Comparison) -> str:
    found = figures(sizes, comparison)
    seconds = " | ".join(f"{1e3 * value:.0f}" for value in found["seconds"])
    memory = " | ".join(f"{value / 1e6:.0f}" for value in found["above_loaded_bytes"])
    return (
        f"| {sizes['dtype']} | {sizes['masked']:.0%} | {seconds} | {found['speed_ratio']:.2f}x"
        f" | {memory} | {found['memory_ratio']:.2f}x |"
    )


if __name__ == "__main__":
    main()
