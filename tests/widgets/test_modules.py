"""Choosing modules: what the settings say is exactly what was chosen, in models of several builds."""

import random
import re

import pytest
import transformers

from nbtune.models import describe, skeleton
from nbtune.peft import LoraConfig
from nbtune.peft.targets import find_targets, walk
from nbtune.spec import ModelSpec
from nbtune_widgets.modulemap import _ESM, ModuleMap
from nbtune_widgets.modules import ModulePicker
from nbtune_widgets.selection import cells_of, numbers, rows_of, settings_of

SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 12,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
CONFIGS = {
    "gpt2": transformers.GPT2Config(vocab_size=512, n_embd=64, n_layer=12, n_head=4),
    "phi": transformers.PhiConfig(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
    "mamba hybrid": transformers.JambaConfig(**SIZES, num_experts=2, attn_layer_period=4, attn_layer_offset=1),
}


@pytest.fixture(scope="module", params=["smollm2", *CONFIGS])
def model(request, tmp_path_factory):
    """(info, the paths of all modules, those of all-linear, the model without weights)."""
    if request.param == "smollm2":
        spec = ModelSpec()
    else:
        folder = tmp_path_factory.mktemp("model")
        config = CONFIGS[request.param]
        config.architectures = [type(config).__name__.replace("Config", "ForCausalLM").replace("GPT2For", "GPT2LMHead")]
        config.save_pretrained(folder)
        (folder / "tokenizer.json").write_text("{}")
        spec = ModelSpec(name=str(folder))
    built = skeleton(spec)
    every = find_targets(built, LoraConfig(target_modules="all-linear"))
    return describe(spec), list(walk(built)), every, built


def meant(choice, built):
    """The paths that a choice means to PEFT."""
    config = LoraConfig(target_modules=choice.target_modules, layers_to_transform=choice.layers_to_transform)
    return set(find_targets(built, config))


def paths_of(rows, cells):
    return {name for index, layers in cells.items() for layer in layers for name in rows[index].modules[layer]}


def test_a_random_choice_is_said_exactly(model):
    info, places, every, built = model
    rows = rows_of(info.modules)
    rng = random.Random(7)
    seen = set()
    for trial in range(60):
        cells = {}
        for index in rng.sample(range(len(rows)), rng.randint(1, len(rows))):
            layers = sorted(rows[index].modules)
            first = rng.randrange(len(layers))
            stretch = layers[first : first + rng.randint(1, len(layers))]
            cells[index] = set(stretch if trial % 2 else rng.sample(layers, rng.randint(1, len(layers))))
        choice = settings_of(rows, cells, places, every)
        found = meant(choice, built)
        assert found == paths_of(rows, cells), choice
        assert cells_of(rows, found) == {index: cells.get(index, set()) for index in range(len(rows))}
        seen.add(type(choice.target_modules))
    assert str in seen


def test_rows_are_the_linear_layers_in_blocks(model):
    info, _, every, _ = model
    rows = rows_of(info.modules)
    assert paths_of(rows, {index: row.modules for index, row in enumerate(rows)}) <= set(every)
    labels = [row.label for row in rows]
    assert len(set(labels)) == len(labels) > 3


@pytest.fixture(scope="module")
def smollm2():
    spec = ModelSpec()
    built = skeleton(spec)
    info = describe(spec)
    return rows_of(info.modules), list(walk(built)), find_targets(built, LoraConfig(target_modules="all-linear"))


@pytest.mark.parametrize(
    ("chosen", "targets", "layers"),
    [
        ({kind: range(30) for kind in range(7)}, "all-linear", None),
        ({0: range(30), 2: range(30)}, ["q_proj", "v_proj"], None),
        ({0: range(15, 30)}, ["q_proj"], list(range(15, 30))),
        ({0: [3], 4: [3]}, ["q_proj", "gate_proj"], [3]),
        (
            {**{kind: range(30) for kind in range(4)}, 4: range(15, 30), 5: range(15, 30)},
            r".*self_attn\.(q|k|v|o)_proj|.*layers\.(1[5-9]|2\d)\.mlp\.(gate|up)_proj",
            None,
        ),
        ({0: [3], 6: [29]}, r".*layers\.3\.self_attn\.q_proj|.*layers\.29\.mlp\.down_proj", None),
    ],
)
def test_the_shortest_words(smollm2, chosen, targets, layers):
    choice = settings_of(smollm2[0], chosen, *smollm2[1:])
    assert (choice.target_modules, choice.layers_to_transform) == (targets, layers)


def test_numbers_as_an_expression():
    rng = random.Random(1)
    for _ in range(500):
        below = rng.choice([5, 12, 30, 80, 126])
        first = rng.randrange(below)
        wanted = set(range(first, rng.randint(first + 1, below)))
        if rng.random() < 0.5:
            wanted = set(rng.sample(range(below), rng.randint(1, below)))
        expression = numbers(wanted)
        assert {n for n in range(300) if re.fullmatch(expression, str(n))} == wanted
    assert numbers(range(15, 30)) == r"1[5-9]|2\d"
    assert numbers(range(30)) == r"\d|[12]\d"
    assert numbers({1, 3, 5, 17, 18, 19, 27, 28, 29}) == "[135]|[12][7-9]"


@pytest.fixture
def picker(smollm2):
    picked = []
    made = ModulePicker(picked.append, lambda act: lambda _: act())
    made.show(describe(ModelSpec()), *smollm2[1:])
    made.picked = picked
    return made


def test_clicks_on_single_cells(picker, smollm2):
    every = smollm2[2]
    picker.mark(every, 100, 1600)
    picker.map._handle_custom_msg({"cells": [[0, 3]], "on": False}, [])  # as the front end sends it
    assert picker.picked[-1].target_modules.startswith(r".*layers\.(")
    picker.mark([path for path in every if path != "model.layers.3.self_attn.q_proj"], 100, 1600)
    assert "209 of 210 modules" in picker.summary.value
    assert picker.map.rows[0]["cells"] == "111" + "0" + "1" * 26
    assert picker.map.layers == 30
    picker.map._handle_custom_msg({"cells": [[0, 3]], "on": True}, [])
    assert picker.picked[-1].target_modules == "all-linear"


def test_an_answer_to_an_older_click_is_not_shown(picker, smollm2):
    picker.mark(smollm2[2], 100, 1600)
    before = picker.version
    picker.paint([(0, 0)], on=False)
    summary = picker.summary.value
    picker.mark(smollm2[2][:1], 1, 16, version=before)
    assert picker.summary.value == summary
    assert picker.picked[-1].layers_to_transform is None


def test_the_last_cell_stays(picker):
    picker.mark(["model.layers.0.self_attn.q_proj"], 1, 16)
    picker.paint([(0, 0)], on=False)
    assert "At least one" in picker.summary.value
    assert picker.picked == []
    assert picker.map.rows[0]["cells"][0] == "1"


def test_plain_rows_stand_behind_the_map(picker):
    """A front end without anywidget never says that it is ready."""
    assert picker.plain.layout.display is None
    picker.map.ready = True
    assert picker.plain.layout.display == "none"


def test_the_map_is_small_and_says_what_it_is():
    assert len(_ESM) < 6000
    for word in ('role: "grid"', "aria-selected", "aria-label", "ArrowDown", "data-lm-suppress-shortcuts"):
        assert word in _ESM
    assert ModuleMap(lambda cells, on: None).ready is False
