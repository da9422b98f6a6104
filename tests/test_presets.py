"""Presets: valid settings, one in the place of another."""

import pytest

from nbtune.errors import SpecError
from nbtune.peft.config import PeftType
from nbtune.presets import PRESETS
from nbtune.spec import RunSpec, settings


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", ["full", *PeftType])
def test_a_preset_is_valid_with_every_method(name, method):
    spec = RunSpec(method=method)
    changed = spec.preset(name)
    known = {setting.path for setting in settings(spec.method)}
    changes = PRESETS[name].changes(spec.method_name)
    assert changes.keys() <= known
    assert changed == spec.updated(**changes)
    for path, value in changes.items():
        part, key = path.split(".")
        assert changed.to_dict()[part][key] == value


@pytest.mark.parametrize("method", ["full", "lora", "oft"])
def test_presets_set_the_same_settings(method):
    first, *others = (set(preset.changes(method)) for preset in PRESETS.values())
    assert len(first) >= 9
    assert all(other == first for other in others)
    one, two = list(PRESETS)[:2]
    assert RunSpec(method=method).preset(one).preset(two) == RunSpec(method=method).preset(two)


def test_what_presets_are_for():
    specs = {name: RunSpec().preset(name) for name in PRESETS}
    quick, least, best = specs["quick look"], specs["least memory"], specs["best quality"]
    assert quick.training.max_steps == 20
    assert least.model.load_in_4bit
    assert least.training.optim == "adamw_8bit"
    assert least.training.per_device_train_batch_size == 1
    assert best.method.r > specs["balanced"].method.r
    assert all(spec.model.name == RunSpec().model.name for spec in specs.values())


def test_a_preset_keeps_rows_and_refuses_an_unknown_name():
    rows = [{"prompt": "a", "completion": "b"}]
    assert RunSpec(data=rows).preset("balanced").data.rows == tuple(rows)
    with pytest.raises(SpecError, match="quick look"):
        RunSpec().preset("quick")
