"""RunSpec: one declaration, from and to everything that carries it."""

import json

import pandas as pd
import pytest
from datasets import Dataset
from pydantic import ValidationError

from nbtune.errors import NbtuneError, SpecError
from nbtune.peft.configs.lora import LoraConfig
from nbtune.peft.configs.vectors import IA3Config
from nbtune.spec import RunSpec, settings

ROWS = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]


def test_a_string_or_a_dict_stands_for_a_part():
    spec = RunSpec(model="m", data="d.jsonl", method=LoraConfig(r=8), training={"max_steps": 8})
    assert (spec.model.name, spec.data.source, spec.method.r, spec.training.max_steps) == ("m", "d.jsonl", 8, 8)
    assert RunSpec(method="full").method == "full"
    assert RunSpec().method == RunSpec(method="lora").method == LoraConfig(target_modules="all-linear")
    assert RunSpec(method={"r": 3}).method == LoraConfig(r=3, target_modules="all-linear")
    assert RunSpec(method={"r": 3, "target_modules": None}).method == LoraConfig(r=3)
    method = RunSpec(method="ia3").method
    assert isinstance(method, IA3Config)
    assert method.target_modules is None  # keys, values and feedforward, as in PEFT


@pytest.mark.parametrize("data", [ROWS, pd.DataFrame(ROWS), Dataset.from_list(ROWS)], ids=lambda d: type(d).__name__)
def test_rows_in_memory_are_data(data):
    spec = RunSpec(data=data)
    assert list(spec.data.rows) == ROWS
    assert spec.data.source == RunSpec(data=ROWS).data.source
    assert spec.updated(r=4).data.rows == spec.data.rows


@pytest.mark.parametrize("method", ["full", LoraConfig(r=3, target_modules=["q_proj"], rank_pattern={"k_proj": 2})])
def test_yaml_gives_back_the_same_spec(tmp_path, method):
    spec = RunSpec(method=method, training={"max_steps": 5, "learning_rate": 3e-4})
    (tmp_path / "spec.yaml").write_text(spec.to_yaml())
    assert RunSpec.from_yaml(tmp_path / "spec.yaml") == spec
    assert RunSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_every_setting_has_a_help_and_a_label():
    for setting in settings():
        assert len(setting.help) > 10, setting.path
        assert setting.label, setting.path


def test_every_setting_can_be_changed_by_its_name():
    spec = RunSpec()
    for setting in settings():
        assert spec.updated(**{setting.path: setting.default}) == spec, setting.path


@pytest.mark.parametrize(
    ("name", "value", "path"),
    [("learning_rate", 1e-5, "training"), ("r", 2, "method"), ("seed", 7, "training"), ("data.seed", 7, "data")],
)
def test_short_names(name, value, path):
    part = getattr(RunSpec().updated(**{name: value}), path)
    assert getattr(part, name.rpartition(".")[2]) == value


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(SpecError, match="learning_rate"):
        RunSpec().updated(learning_rte=1)


def test_an_adapter_setting_without_an_adapter_is_an_error():
    with pytest.raises(SpecError, match="method is 'full'"):
        RunSpec(method="full").updated(r=4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training": {"learning_rate": -1}}, "training.learning_rate"),
        ({"training": {"max_step": 3}}, "training.max_step"),
        ({"training": {"max_steps": 0}}, "max_steps is 0"),
        ({"method": {"r": 0}}, "r"),
        ({"method": 7}, "method is 7"),
        ({"model": {"dtype": "int3"}}, "model.dtype"),
        ({"data": 3}, "data is a int"),
    ],
)
def test_a_wrong_value_names_its_setting(values, message):
    with pytest.raises(NbtuneError, match=message):
        RunSpec.from_dict(values)
    with pytest.raises((ValidationError, NbtuneError)):
        RunSpec(**values)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", ""])
def test_a_broken_file_is_named(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=r"broken\.yaml"):
        RunSpec.from_yaml(path)
    with pytest.raises(SpecError, match="cannot be read"):
        RunSpec.from_yaml(tmp_path / "missing.yaml")
