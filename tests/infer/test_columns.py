from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from nbtune.errors import AdapterError, NbtuneError, RunError
from nbtune.infer.columns import line_up
from nbtune.spec import ModelSpec, RunSpec


def test_runs_ids_folders_and_the_base(runs_dir, adapters):
    run = SimpleNamespace(id="amber-heron", path=runs_dir / "amber-heron")
    for columns in (["base", run, "quiet.otter"], [runs_dir / "amber-heron", runs_dir / "quiet.otter" / "adapter"]):
        lineup = line_up(columns, runs_dir)
        assert list(lineup.adapters) == ["amber-heron", "quiet.otter"]
        assert lineup.labels == {"base": "as it was", "amber-heron": "LoRA r4", "quiet.otter": "LoRA r8"}
        assert lineup.model.dtype == "float32"  # from the run's spec
    alone = line_up([adapters["amber-heron"]])
    assert alone.model == ModelSpec(name="smollm2-135m-instruct")  # from the adapter
    assert list(alone.adapters) == ["amber-heron"]


def test_nothing_is_the_base_model_alone():
    assert line_up([]).columns == ()
    assert line_up(["base"]).model == ModelSpec()


def test_the_environment_names_the_runs_folder(runs_dir, monkeypatch):
    monkeypatch.setenv("NBTUNE_RUNS", str(runs_dir))
    assert list(line_up(["amber-heron"]).adapters) == ["amber-heron"]


def test_the_same_column_twice_is_one_and_two_of_a_name_are_told_apart(adapters, tmp_path):
    (tmp_path / "amber-heron").mkdir()
    for file in adapters["amber-heron"].iterdir():
        (tmp_path / "amber-heron" / file.name).write_bytes(file.read_bytes())
    lineup = line_up([adapters["amber-heron"], str(adapters["amber-heron"]), tmp_path / "amber-heron"])
    assert list(lineup.adapters) == ["amber-heron", "amber-heron (2)"]


def test_an_unknown_run_is_refused_with_the_known_ones(runs_dir):
    with pytest.raises(RunError, match=r"no-such[\s\S]*amber-heron, quiet\.otter"):
        line_up(["no-such"], runs_dir)


def test_a_run_without_weights_is_refused(tmp_path):
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "spec.yaml").write_text(RunSpec().to_yaml())
    with pytest.raises(RunError, match="no weights yet"):
        line_up(["young"], tmp_path)


def test_a_full_fine_tune_is_a_model_of_its_own(tmp_path):
    run = tmp_path / "whole"
    (run / "model").mkdir(parents=True)
    (run / "spec.yaml").write_text(RunSpec(method="full").to_yaml())
    with pytest.raises(RunError, match="no weights"):
        line_up([run])
    (run / "model" / "config.json").write_text("{}")
    lineup = line_up([run])
    assert lineup.models == {"whole": run / "model"}
    assert lineup.adapters == {}


def test_other_bases_are_columns_with_their_adapters(adapters, tiny_model, runs_dir, tmp_path):
    config = json.loads((adapters["amber-heron"] / "adapter_config.json").read_text())
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(tiny_model)})
    )
    lineup = line_up(["amber-heron", tmp_path / "small", "quiet.otter"], runs_dir)
    assert lineup.model.name == "smollm2-135m-instruct"
    assert list(lineup.adapters) == ["amber-heron", "quiet.otter"]
    base = f"base ({tiny_model.name})"
    (family,) = lineup.others
    assert (family.name, family.model.name) == (base, str(tiny_model))
    assert family.adapters == {"small": tmp_path / "small"}
    labels = {"base": "as it was", base: "as it was", "amber-heron": "LoRA r4", "small": "LoRA r4"}
    assert lineup.labels == labels | {"quiet.otter": "LoRA r8"}
    with pytest.raises(NbtuneError, match=r"different base models[\s\S]*smollm2-135m-instruct; base \(tiny"):
        lineup.require_one_base()
    line_up(["amber-heron"], runs_dir).require_one_base()


def test_a_model_is_a_column(tiny_model, adapters):
    alone = line_up([ModelSpec(name=str(tiny_model))])
    assert (alone.model.name, alone.others) == (str(tiny_model), ())
    beside = line_up([adapters["amber-heron"], ModelSpec(name=str(tiny_model))])
    assert [family.name for family in beside.others] == [f"base ({tiny_model.name})"]
    # A packaged model and its file are one.
    same = line_up([adapters["amber-heron"], ModelSpec(name="SmolLM2-135M-Instruct")])
    assert same.others == ()


def test_a_full_fine_tune_of_another_base_is_of_its_family(tiny_model, adapters, tmp_path):
    run = tmp_path / "whole"
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").write_text("{}")
    (run / "spec.yaml").write_text(RunSpec(method="full", model=ModelSpec(name=str(tiny_model))).to_yaml())
    lineup = line_up([adapters["amber-heron"], run])
    assert lineup.models == {}
    assert [(family.name, family.model.name) for family in lineup.others] == [
        (f"base ({tiny_model.name})", str(tiny_model)),
        ("whole", str(run / "model")),
    ]


def test_an_adapter_that_names_no_base_or_cannot_be_read_is_refused(tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_text('{"peft_type": "LORA"}')
    with pytest.raises(AdapterError, match="base_model_name_or_path"):
        line_up([tmp_path])
    path.write_text("{")
    with pytest.raises(AdapterError, match="cannot be read"):
        line_up([tmp_path])
