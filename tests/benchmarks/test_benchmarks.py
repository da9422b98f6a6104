"""The benchmarks run, write what they promise, and refuse to compare sides that did different work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import adapters
import sft
import step
from _lora import step_flops
from _side_by_side import DisagreementError, Side, compare, matrix_rate, paced

MEGABYTE = 1 << 20


def holding(megabytes: int, loss: float = 1.0, order: Path | None = None, name: str = ""):
    """A side that allocates so much in each round."""
    yield {"ready": True}
    for number in range(9):
        block = bytearray(megabytes * MEGABYTE)
        if order is not None:
            with order.open("a") as file:
                file.write(name)
        size = len(block)
        del block
        yield {"loss": loss, "grad_norm": size, "tokens": 10, "data": number}


def failing():
    yield {}
    raise ValueError("of all things")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The real tokenizer beside a small random model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from nbtune.models import load_tokenizer
    from nbtune.spec import ModelSpec

    folder, tokenizer = tmp_path_factory.mktemp("tiny"), load_tokenizer(ModelSpec())
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def figures(benchmark: Any, folder: Path, *arguments: str) -> dict[str, Any]:
    files = ["--json", str(folder / "figures.json"), "--page", str(folder / "page.html")]
    benchmark.main([*arguments, *files, "--one-process", "--threads", "1"])
    found = json.loads((folder / "figures.json").read_text())
    page = (folder / "page.html").read_text()
    assert found["benchmark"] in page
    assert "https://cdn" not in page.split("</script>")[0][:2000]  # the page works offline
    assert {"torch", "transformers", "peft", "trl"} <= set(found["versions"])
    assert found["machine"]["cores"] >= 1
    assert found["speed_ratio"] > 0
    assert found["memory_ratio"] != 0
    return found


def test_sides_take_turns_in_processes_whose_memory_is_told_apart(tmp_path):
    order = tmp_path / "order"
    sides = [
        Side("small", holding, {"megabytes": 40, "order": order, "name": "A"}),
        Side("large", holding, {"megabytes": 120, "order": order, "name": "B"}),
    ]
    comparison = compare(sides, rounds=3, warmup=1, threads=1, dtypes=())
    assert order.read_text() == "ABABABAB"
    assert len(comparison[0].seconds) == 3
    assert len(comparison[0].values) == 4
    assert comparison[0].ready == {"ready": True}
    assert comparison[0].above_bytes == pytest.approx(40 * MEGABYTE, rel=0.1)
    assert comparison[1].above_bytes == pytest.approx(120 * MEGABYTE, rel=0.1)
    assert comparison.memory_ratio(comparison[1]) == pytest.approx(1 / 3, rel=0.1)


def test_what_a_side_raises_is_raised():
    with pytest.raises(RuntimeError, match="of all things"):
        compare([Side("broken", failing)], rounds=1, dtypes=())


def test_work_that_differs_is_not_compared():
    def run(**other: Any):
        sides = [Side("a", holding, {"megabytes": 1}), Side("b", holding, {"megabytes": 1, **other})]
        return compare(sides, rounds=2, dtypes=(), apart=False)

    same = run(loss=1.009)
    same.require_same("data")
    same.require_positive("grad_norm")
    same.require_close("loss", 0.01)
    with pytest.raises(DisagreementError, match="loss differs"):
        run(loss=1.02).require_close("loss", 0.01)
    with pytest.raises(DisagreementError, match="loss differs"):
        run(loss=float("nan")).require_close("loss", 0.01)
    with pytest.raises(DisagreementError, match="loss of round 0"):
        run(loss=1.02).require_same("loss")
    with pytest.raises(DisagreementError, match="grad_norm of b"):
        run(megabytes=0).require_positive("grad_norm")


def test_ratios_are_of_seconds_a_token():
    comparison = compare([Side("a", holding, {"megabytes": 1})] * 2, rounds=3, dtypes=(), apart=False)
    ours, theirs = comparison.sides
    ours.seconds, theirs.seconds = [1.0, 2.0, 1.0], [2.0, 2.0, 3.0]
    theirs.values = [{"tokens": 5}] * 4
    assert comparison.speed_ratio(theirs) == 4.0
    assert ours.per_second("tokens") == 30 / 4


def test_work_that_calls_back_stands_still_between_rounds():
    done = []

    def work(report):
        for number in range(3):
            done.append(number)
            report({"number": number})
        raise ValueError("at the end")

    rounds = paced(work)
    for number in range(3):
        assert next(rounds) == {"number": number}
        assert done == list(range(number + 1))
    with pytest.raises(ValueError, match="at the end"):
        next(rounds)


def test_the_matrix_rate_is_of_this_machine():
    assert 1e8 < matrix_rate("float32", seconds=0.01) < 1e15


def test_flops_count_the_products_of_a_model():
    """Against torch's own counter, on a model without adapters: what LoRA adds is left out by its rank."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=128, num_key_value_heads=2, attn_implementation="eager", **sizes)
    model = LlamaForCausalLM(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 32, dtype=torch.long))
    attention = 2 * 2 * 2 * 2 * 32**2 * 64  # layers, rows, products: not halved by the causal mask
    low_rank = 6 * 16 * 2 * 64 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    # A base product forward and backward, causal attention forward and twice backward.
    expected = 2 * (counter.get_total_flops() - attention) + 3 * attention / 2 + low_rank
    assert step_flops(config, [32, 32], 64) == expected


def test_step(tiny, tmp_path):
    found = figures(step, tmp_path, "--model", str(tiny), "--rounds", "2", "--batch", "2", "--length", "32")
    assert found["loss_deviation"] < 0.01
    assert found["ours"]["trained_parameters"] == found["theirs"]["trained_parameters"]
    assert found["ours"]["mfu"] > 0


def test_sft(tiny, tmp_path):
    rows = [{"instruction": f"Count to {n}.", "input": "", "output": "1 2 3 4 " * (n % 5 + 1)} for n in range(240)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = ("--data", str(tmp_path / "rows.json"))
    found = figures(sft, tmp_path, "--model", str(tiny), "--rounds", "1", *data)
    assert found["loss_deviation"] < 0.01
    assert set(found["against"]) == {"trl default", "trl packed", "trl grouped"}
    assert found["best_tuned"]["name"] in ("trl packed", "trl grouped")
    assert found["ours"]["tokens_per_second"] > 0


def test_adapters(tiny, tmp_path):
    found = figures(adapters, tmp_path, "--model", str(tiny), "--rounds", "2", "--many", "9")
    assert set(found["operations"]) == {"attach", "save", "load", "add", "switch", "disable"}
    assert found["speed_ratio"] == found["operations"]["attach"]["speed_ratio"]
    assert found["operations"]["switch"]["ours_ms"] < 1
    assert found["many"]["switch"]["speed_ratio"] > 1
