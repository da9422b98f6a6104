"""What it takes to attach, save, load, switch and disable adapters, nbtune beside peft.

    uv run python benchmarks/adapters.py                  # about 3 minutes
    uv run python benchmarks/adapters.py --many 0         # the first table only, about 1 minute

First LoRA r=16 on all linear layers of SmolLM2-135M-Instruct. `speed_ratio` is of `attach`; `operations` has all:

    attach    get_peft_model on the loaded base model
    save      save_pretrained into an empty folder
    load      PeftModel.from_pretrained on the loaded base model, from that folder
    add       load_adapter of the same folder under a second name
    switch    set_adapter from one of the two to the other
    disable   enter and leave disable_adapter

Then many adapters on a Llama of 32 blocks with 224 linear layers of 256 features, fp32: the last one loaded, switching,
and batches of single tokens in which each row has another adapter. All with one thread unless --threads says otherwise.
"""

from __future__ import annotations

import importlib
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from _lora import MODEL, SETTINGS, folder, touch
from _report import finish, parser
from _side_by_side import Comparison, Side, Values, compare

ROWS = 8
LIBRARIES = ("nbtune.peft", "peft")


def operations(library: str, model: str, repeats: int = 5) -> Iterator[Values]:
    """Rounds of everything one does with an adapter on the real model; the milliseconds of each."""
    peft = _quiet(library)
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16")
    touch(base)
    yield {}
    while True:
        times: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as saved:
            shutil.rmtree(saved)
            config = peft.LoraConfig(**SETTINGS)
            adapted = _timed(times, "attach", peft.get_peft_model, base, config)
            _timed(times, "save", adapted.save_pretrained, saved)
            base = adapted.unload()
            adapted = _timed(times, "load", peft.PeftModel.from_pretrained, base, saved)
            _timed(times, "add", adapted.load_adapter, saved, "second")
            times["switch"] = _least(["second", "default"] * repeats, adapted.set_adapter)
            times["disable"] = _least([adapted] * repeats, _disable)
            base = adapted.unload()
        yield {"milliseconds": times}


def many(library: str, adapters: int) -> Iterator[Values]:
    """One round with this many adapters on one model; milliseconds of everything."""
    peft = _quiet(library)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=32, num_attention_heads=4
    )
    settings = {"r": 8, "target_modules": "all-linear", "init_lora_weights": False}
    model = peft.get_peft_model(LlamaForCausalLM(config).eval(), peft.LoraConfig(**settings), "a0")
    yield {}
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        numbers = range(1, adapters)
        for number in numbers[:-3]:
            model.load_adapter(f"{saved}/a0", f"a{number}")
        times["load the last (least of 3)"] = _least(
            numbers[-3:], lambda number: model.load_adapter(f"{saved}/a0", f"a{number}")
        )
    model.eval()
    times["switch"] = _least(["a1", "a0"] * 5, model.set_adapter)
    times["disable"] = _least([model] * 5, _disable)
    names = [f"a{number}" for number in range(ROWS)]
    ids = torch.randint(0, 512, (ROWS, 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        times[f"{ROWS} tokens, one adapter"] = _least(range(15), lambda _: model(input_ids=ids))
        times[f"{ROWS} tokens, {ROWS} adapters"] = _least(
            range(15), lambda _: model(input_ids=ids, adapter_names=names)
        )
    yield {"milliseconds": times}


def _quiet(library: str) -> Any:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.simplefilter("ignore")
    return importlib.import_module(library)


def _timed(times: dict[str, float], name: str, run: Callable[..., Any], *arguments: Any) -> Any:
    start = time.perf_counter()
    result = run(*arguments)
    times[name] = 1000 * (time.perf_counter() - start)
    return result


def _least(each: Iterable[Any], run: Callable[[Any], Any]) -> float:
    """The least milliseconds of `run` with each of the arguments."""
    times: list[dict[str, float]] = [{} for _ in each]
    for found, argument in zip(times, each, strict=True):
        _timed(found, "run", run, argument)
    return min(found["run"] for found in times)


def _disable(model: Any) -> None:
    with model.disable_adapter():
        pass


def table(comparison: Comparison) -> dict[str, dict[str, float]]:
    """The median milliseconds of each operation, and how many times faster ours is."""
    found = {}
    for name in comparison[0].timed[0]["milliseconds"]:
        ours, theirs = ([values["milliseconds"][name] for values in side.timed] for side in comparison.sides)
        ratios = [other / own for own, other in zip(ours, theirs, strict=True)]
        found[name] = {
            "ours_ms": statistics.median(ours),
            "theirs_ms": statistics.median(theirs),
            "speed_ratio": statistics.median(ratios),
        }
    return found


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n| {title}, ms | nbtune | peft | peft / nbtune |\n|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['ours_ms']:.3g} | {row['theirs_ms']:.3g} | {row['speed_ratio']:.1f} |")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, rounds=7, threads=1)
    options.add_argument("--model", default=MODEL, help="a model that nbtune can load")
    options.add_argument(
        "--many", type=int, default=64, metavar="N", help="adapters of the second table; 0 leaves it out"
    )
    given = options.parse_args(arguments)

    path = str(folder(given.model))
    how = {"threads": given.threads, "apart": not given.one_process}
    sides = [Side(library, operations, {"library": library, "model": path}) for library in LIBRARIES]
    comparison = compare(sides, rounds=given.rounds, warmup=1, **how)
    one, lots = table(comparison), {}
    show("one adapter on the 135M model", one)
    if given.many:
        sides = [Side(library, many, {"library": library, "adapters": given.many}) for library in LIBRARIES]
        lots = table(compare(sides, rounds=1, warmup=0, **how))
        show(f"with {given.many} adapters", lots)
    finish("adapters", comparison, given, speed_ratio=one["attach"]["speed_ratio"], operations=one, many=lots)


if __name__ == "__main__":
    main()
