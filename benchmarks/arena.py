"""Answers of the base and three adapters at once, nbtune beside one column of its own and beside peft.

    uv run python benchmarks/arena.py                     # about 2 minutes on two cores
    uv run python benchmarks/arena.py --tokens 128 --json arena.json

SmolLM2-135M-Instruct in bf16 with three LoRA adapters (r=16, all linear layers, random weights). Each round is one
question, answered greedily to `--tokens` tokens, in the engine of the arena; of peft, `generate` with `adapter_names`.
`four_columns` is the time of four columns over that of one adapter's, the prompt's reading included;
`switch` the milliseconds of another active adapter.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _lora import MODEL, SETTINGS, folder
from _report import finish, parser
from _side_by_side import Measured, Side, Values, compare

QUESTION = [{"role": "user", "content": "What does `os.path.join` do in Python? Explain it at length."}]
ADAPTERS = ("first", "second", "third")


def write_adapters(model: str, into: Path) -> None:
    """Three adapters that change what the model says."""
    from nbtune.models import load
    from nbtune.peft import LoraConfig, get_peft_model
    from nbtune.spec import ModelSpec

    base = load(ModelSpec(name=model, dtype="bfloat16")).model
    for seed, name in enumerate(ADAPTERS):
        torch.manual_seed(seed)
        adapted = get_peft_model(base, LoraConfig(**SETTINGS))
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.02)
        adapted.save_pretrained(into / name)
        adapted.unload()


def ours(model: str, adapters: str, columns: Sequence[str], tokens: int) -> Iterator[Values]:
    """The engine, with these of its columns asked."""
    from nbtune.infer.engine import Engine
    from nbtune.infer.sampling import GREEDY
    from nbtune.spec import ModelSpec

    spec = ModelSpec(name=model, dtype="bfloat16")
    engine = Engine(spec, {name: Path(adapters) / name for name in ADAPTERS})
    engine.base_of("base").stop_tokens = frozenset()  # all rounds do the same work
    yield {}
    while True:
        found = 0
        for _ in engine.stream(dict.fromkeys(columns, QUESTION), GREEDY, max_new_tokens=tokens):
            found += 1
        yield {"tokens": found, "switch": _switch(engine.base_of("base")._model, ["column_0", "column_1"])}


def theirs(model: str, adapters: str, columns: Sequence[str], tokens: int) -> Iterator[Values]:
    """Peft's rows with other adapters, in transformers' generate."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16")
    adapted: Any = peft.PeftModel.from_pretrained(base, f"{adapters}/{ADAPTERS[0]}", adapter_name=ADAPTERS[0])
    for name in ADAPTERS[1:]:
        adapted.load_adapter(f"{adapters}/{name}", adapter_name=name)
    adapted.eval()
    text = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].repeat(len(columns), 1)
    names = ["__base__" if column == "base" else column for column in columns]
    yield {}
    while True:
        out = adapted.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, do_sample=False,
            min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0,
        )  # fmt: skip
        yield {"tokens": len(columns) * (out.shape[1] - ids.shape[1]), "switch": _switch(adapted, ADAPTERS[:2])}


def _switch(model: Any, names: Sequence[str]) -> float:
    """The least milliseconds of making another adapter the active one."""
    found = []
    for name in [*names] * 3:
        start = time.perf_counter()
        model.set_adapter(name)
        found.append(1000 * (time.perf_counter() - start))
    return min(found)


def ratio_of(side: Measured, other: Measured) -> float:
    """The median over rounds, which are run in turns."""
    return statistics.median(a / b for a, b in zip(side.seconds, other.seconds, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, rounds=5)
    options.add_argument("--model", default=MODEL, help="a model that nbtune can load")
    options.add_argument("--tokens", type=int, default=64, help="of every answer")
    given = options.parse_args(arguments)
    with tempfile.TemporaryDirectory() as adapters:
        path = str(folder(given.model))
        write_adapters(path, Path(adapters))
        settings = {"model": path, "adapters": adapters, "tokens": given.tokens}
        sides = [
            Side("nbtune, 4 columns", ours, {**settings, "columns": ("base", *ADAPTERS)}),
            Side("peft, 4 rows", theirs, {**settings, "columns": ("base", *ADAPTERS)}),
            Side("nbtune, 1 adapter", ours, {**settings, "columns": ADAPTERS[:1]}),
            Side("nbtune, base alone", ours, {**settings, "columns": ("base",)}),
        ]
        comparison = compare(sides, rounds=given.rounds, warmup=1, threads=given.threads, apart=not given.one_process)
    four, peft_four, one, bare = comparison.sides
    ratio = ratio_of(four, one)
    switch = {side.name: min(values["switch"] for values in side.timed) for side in (four, peft_four)}
    print(f"\n4 columns take {ratio:.2f} times the time of one with an adapter, "
          f"{ratio_of(four, bare):.2f} times that of the base alone; "
          f"switching {switch[four.name]:.4f} ms, in peft {switch[peft_four.name]:.2f} ms")  # fmt: skip
    finish("arena", comparison, given, four_columns=ratio, switch_ms=switch)


if __name__ == "__main__":
    main()
