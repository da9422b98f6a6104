"""Packing, the order of batches, and the flat row."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from nbtune.data import Batches, Example, collate, pack
from nbtune.data.packing import IGNORED


def examples(lengths: list[int]) -> list[Example]:
    made = []
    for index, length in enumerate(lengths):
        ids = np.arange(length, dtype=np.int32) + 1000 * index
        made.append(Example(ids, ids.copy()))
    return made


def draw_lengths(kind: str, count: int, capacity: int) -> list[int]:
    draw = random.Random(kind)
    match kind:
        case "alike":
            return [min(capacity, max(1, round(draw.gauss(62, 10)))) for _ in range(count)]
        case "long tail":
            return [min(capacity, round(draw.lognormvariate(4.5, 1)) + 1) for _ in range(count)]
        case "any":
            return [draw.randint(1, capacity) for _ in range(count)]
        case _:
            return [1] * count


@pytest.mark.parametrize("kind", ["alike", "long tail", "any", "ones"])
@pytest.mark.parametrize("count", [0, 1, 2, 37, 5000])
def test_every_item_in_one_bin_that_holds_it(kind, count):
    lengths = draw_lengths(kind, count, 512)
    bins = pack(lengths, 512)
    assert sorted(index for items in bins for index in items) == list(range(count))
    assert all(0 < sum(lengths[index] for index in items) <= 512 for items in bins)
    assert bins == pack(lengths, 512)


@pytest.mark.parametrize("kind", ["alike", "long tail"])
def test_bins_are_full(kind):
    lengths = draw_lengths(kind, 5000, 512)
    bins = pack(lengths, 512)
    assert sum(lengths) / (512 * len(bins)) > 0.97


def test_order_does_not_change_the_number_of_bins():
    lengths = draw_lengths("long tail", 2000, 512)
    counts = set()
    for seed in range(5):
        random.Random(seed).shuffle(lengths)
        counts.add(len(pack(lengths, 512)))
    assert len(counts) == 1


def test_a_hundred_thousand_items():
    lengths = draw_lengths("long tail", 100_000, 2048)
    start = time.process_time()
    pack(lengths, 2048)
    assert time.process_time() - start < 3


@pytest.mark.parametrize("length", [0, 513])
def test_item_that_fits_no_bin(length):
    with pytest.raises(ValueError, match="item 1 has length"):
        pack([5, length], 512)


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_holds_every_example_once(packing):
    made = examples(draw_lengths("long tail", 300, 512))
    batches = Batches(made, 4, 512, packing=packing, seed=3)
    for number in range(3):
        epoch = batches.epoch(number)
        assert len(epoch) == len(batches)
        rows = [row for batch in epoch for row in batch]
        assert sorted(index for row in rows for index in row) == list(range(300))
        assert all(len(batch) == 4 for batch in epoch[:-1])
        assert all(sum(len(made[index]) for index in row) <= 512 for row in rows)
        assert packing or all(len(row) == 1 for row in rows)


def test_epochs_differ_and_come_again():
    made = examples(draw_lengths("alike", 200, 512))
    batches = Batches(made, 2, 512, seed=0)
    assert batches.epoch(1) == Batches(made, 2, 512, seed=0).epoch(1)
    assert batches.epoch(0) != batches.epoch(1)
    assert batches.epoch(0) != Batches(made, 2, 512, seed=1).epoch(0)


def test_the_order_is_the_same_in_another_process():
    program = (
        "import numpy as np; from nbtune.data import Batches, Example\n"
        "made = [Example(np.zeros(5 + i % 90, np.int32), np.zeros(5 + i % 90, np.int32)) for i in range(500)]\n"
        "print(Batches(made, 2, 256, seed=7).epoch(3))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1


def test_steps_per_epoch():
    batches = Batches(examples([512] * 10), 3, 512)
    assert len(batches) == 4
    assert [batches.steps_per_epoch(n) for n in (1, 2, 3, 4, 9)] == [4, 2, 2, 1, 1]


def test_evaluation_order():
    batches = Batches(examples([300, 200, 300]), 1, 512)
    assert sorted(index for batch in batches.in_order() for row in batch for index in row) == [0, 1, 2]
    assert list(batches.in_order()) == list(batches.in_order())


def test_flat_row():
    made = examples([3, 2, 4])
    batch = collate([[made[2], made[0]], [made[1]]])
    assert batch.input_ids.tolist() == [[2000, 2001, 2002, 2003, 0, 1, 2, 1000, 1001]]
    assert batch.labels.tolist() == [[IGNORED, 2001, 2002, 2003, IGNORED, 1, 2, IGNORED, 1001]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1]]
    assert batch.cu_seq_lens.tolist() == [0, 4, 7, 9]
    assert (batch.max_length, batch.tokens) == (4, 9)
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert batch.cu_seq_lens.dtype == torch.int32
    assert made[2].labels[0] == 2000  # the example itself is not changed
    assert batch.to("cpu").labels.equal(batch.labels)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_loss_of_packed_rows_is_that_of_each_example_alone(batch_size):
    import transformers

    from nbtune.kernels.attention import NAME, register
    from nbtune.train.loss import CausalLMLoss

    draw = np.random.default_rng(0)
    made = []
    for length in [2, 30, 7, 19, 11, 40, 3, 25]:
        ids = draw.integers(0, 64, length, dtype=np.int32)
        made.append(Example(ids, np.where(draw.random(length) < 0.4, IGNORED, ids).astype(np.int32)))
    register()
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=8,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    alone, tokens = 0.0, 0
    with torch.no_grad():
        for example in made:
            ids, labels = (torch.from_numpy(part).long()[None] for part in (example.input_ids, example.labels))
            count = int((labels[:, 1:] != IGNORED).sum())
            if count:
                alone += float(model(ids, labels=labels).loss) * count
                tokens += count
        model.set_attn_implementation(NAME)
        together = 0.0
        for rows in Batches(made, batch_size, 48).in_order():
            batch = collate([[made[index] for index in row] for row in rows])
            output = CausalLMLoss(model)(
                batch.input_ids, batch.labels, batch.position_ids, batch.cu_seq_lens, batch.max_length, num_items=tokens
            )
            together += float(output.loss)
    assert together == pytest.approx(alone / tokens, rel=1e-5)


# Real files


def texts_of(folder, name):
    """The text of each row of a sample, whatever its form."""
    text = (folder / name).read_text(encoding="utf-8")
    match name:
        case "wiki_demo.txt":
            return [line for line in text.splitlines() if line.strip()]
        case "c4_demo.jsonl":
            return [json.loads(line)["text"] for line in text.splitlines()]
        case "alpaca_en_demo.json" | "identity.json":
            return ["\n".join((row["instruction"], row["input"], row["output"])) for row in json.loads(text)]
        case _:
            turns = [row["conversations"] + [row[key] for key in ("chosen",) if key in row] for row in json.loads(text)]
            return ["\n".join(turn["value"] for turn in row) for row in turns]


@pytest.mark.sample_data
@pytest.mark.parametrize("max_length", [512, 1024])
@pytest.mark.parametrize(
    "name",
    [
        "alpaca_en_demo.json",
        "identity.json",
        "glaive_toolcall_en_demo.json",
        "dpo_en_demo.json",
        "c4_demo.jsonl",
        "wiki_demo.txt",
    ],
)
def test_bins_of_every_sample_are_full(samples, smollm_tokenizer, name, max_length):
    lengths = [min(len(ids), max_length) for ids in smollm_tokenizer(texts_of(samples, name)).input_ids]
    bins = len(pack(lengths, max_length))
    least = math.ceil(sum(lengths) / max_length)
    assert bins == least or sum(lengths) / (max_length * bins) > 0.97
