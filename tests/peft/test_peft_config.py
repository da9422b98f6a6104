"""Configs: PEFT's names and defaults, refused where they cannot be right, the same after a trip through JSON."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import peft
import pytest

import nbtune.peft
from nbtune.errors import AdapterError
from nbtune.peft import LoraConfig, PeftConfig, TaskType
from nbtune.spec import RunSpec, settings

# Settings whose value at PEFT's default is not the point of PEFT's file: who wrote it, and how it is run.
NOT_COMPARED = {"peft_version", "runtime_config", "extra"}


def test_importing_the_room_and_its_configs_does_not_import_torch():
    code = "import sys, nbtune.peft; nbtune.peft.LoraConfig(r=2); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_are_found_and_unknown_ones_are_not():
    assert all(getattr(nbtune.peft, name) is not None for name in nbtune.peft.__all__)
    with pytest.raises(AttributeError, match="no attribute 'get_pft_model'"):
        _ = nbtune.peft.get_pft_model


def test_names_and_defaults_are_those_of_peft():
    ours, theirs = LoraConfig().to_dict(), peft.LoraConfig().to_dict()
    assert theirs.keys() - NOT_COMPARED <= ours.keys()
    assert {key: theirs[key] for key in theirs.keys() - NOT_COMPARED} == {
        key: ours[key] for key in theirs.keys() - NOT_COMPARED
    }


def test_a_config_survives_a_dict_json_and_a_run_spec():
    config = LoraConfig(
        r=4, lora_alpha=3.5, target_modules={"v", "q"}, rank_pattern={"q": 2}, task_type=TaskType.CAUSAL_LM
    )
    assert config.target_modules == ["q", "v"]
    assert PeftConfig.from_dict(config.to_dict()) == config
    assert PeftConfig.from_dict(json.loads(config.to_json())) == config
    spec = RunSpec(method=config)
    assert RunSpec.from_dict(spec.to_dict()).method == config
    assert RunSpec(method="lora").method == LoraConfig(target_modules="all-linear")


def test_repr_shows_what_was_chosen():
    assert repr(LoraConfig(r=4, target_modules=["q"])) == "LoraConfig(target_modules=['q'], r=4)"


def test_every_choice_of_a_user_has_help():
    shown = {setting.name for setting in settings(LoraConfig) if setting.part == "method"}
    modules = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
    numbers = {"r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern"}
    more = {
        "bias",
        "use_dora",
        "lora_bias",
        "target_parameters",
        "trainable_token_indices",
        "loftq_config",
        "eva_config",
    }
    assert shown == modules | numbers | more


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r is 0; it must be at least 1"),
        ({"r": -3}, "r is -3; it must be at least 1"),
        ({"r": 2.5}, "r is 2.5; it must be of type int"),
        ({"r": "8"}, "r is '8'; it must be of type int"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": 0}, "lora_alpha is 0; it must be more than 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0; it must be less than 1"),
        ({"lora_dropout": -0.1}, "must be at least 0"),
        ({"init_lora_weights": "pissa"}, "must be one of True, False, 'gaussian'"),
        ({"init_lora_weights": 1}, "must be one of"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'; it must be of type bool"),
        ({"target_modules": []}, "must name at least one module"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"target_modules": "(q"}, "must be a regular expression"),
        ({"exclude_modules": "(q"}, "must be a regular expression"),
        (
            {"target_modules": "q", "layers_to_transform": [0]},
            "layers_to_transform is set, but target_modules is the text",
        ),
        ({"layers_pattern": "layers"}, "only says where layers_to_transform counts"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform is"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern['q'] is 0"),
        ({"rank_pattern": {"(": 1}}, "must be a regular expression"),
        ({"alpha_pattern": {"q": -1.0}}, "alpha_pattern['q'] is -1.0"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'"),
        ({"task_type": "CHAT"}, "task_type is 'CHAT'; it must be one of SEQ_CLS"),
        ({"rnk": 4}, "LoraConfig has no setting 'rnk'"),
        ({"lora_alfa": 4}, "Did you mean lora_alpha"),
        ({"use_qalora": True}, "use_qalora is True; nbtune cannot do this yet"),
        ({"bias": "some"}, "bias is 'some'; it must be one of 'none', 'all', 'lora_only'"),
        ({"use_dora": True, "lora_bias": True}, "DoRA has no place for a bias"),
        ({"init_lora_weights": "pissa_niter_x"}, "init_lora_weights is 'pissa_niter_x'; it must be one of"),
    ],
)
def test_a_value_that_cannot_be_right_is_refused_by_name(settings, message):
    with pytest.raises(AdapterError) as caught:
        LoraConfig(**settings)
    assert message in str(caught.value)


def test_settings_of_peft_that_are_off_are_accepted():
    assert (
        LoraConfig(use_dora=False, bias="none", fan_in_fan_out=False, eva_config=None, loftq_config={}) == LoraConfig()
    )


def test_an_unknown_method_is_refused_with_those_that_are_known():
    with pytest.raises(AdapterError, match="nbtune knows LORA"):
        PeftConfig.from_dict({"peft_type": "BONE"})
    with pytest.raises(AdapterError, match="no peft_type"):
        PeftConfig.from_dict({"r": 4})
    assert LoraConfig.from_dict({"r": 4}) == LoraConfig(r=4)


def test_keys_of_a_newer_file_are_kept_and_warned_about(tmp_path):
    values = {**LoraConfig(r=4, target_modules=["q"]).to_dict(), "peft_version": "9.0", "sparkle": 3}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="sparkle"):
        config = PeftConfig.from_pretrained(tmp_path)
    assert config.to_dict()["sparkle"] == 3
    with pytest.warns(UserWarning, match="sparkle"):
        assert PeftConfig.from_dict(config.to_dict()) == config
    with pytest.raises(AdapterError, match="sparkle"):  # in a dict that a person wrote it is a slip of the pen
        PeftConfig.from_dict({"peft_type": "LORA", "sparkle": 3})


def test_a_file_with_a_feature_that_is_not_there_yet_is_refused(tmp_path):
    peft.LoraConfig(target_modules=["q"], use_dora=True).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="use_dora is True"):
        PeftConfig.from_pretrained(tmp_path)


def test_broken_config_files_are_named(tmp_path):
    file = tmp_path / "adapter_config.json"
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json"):
        PeftConfig.from_pretrained(tmp_path)
    file.write_text('{"peft_type": "LORA",')
    with pytest.raises(AdapterError, match=r"adapter_config\.json: Expecting"):
        PeftConfig.from_pretrained(tmp_path)
    file.write_text("[]")
    with pytest.raises(AdapterError, match="holds a list"):
        PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="is no folder"):
        PeftConfig.from_pretrained(tmp_path / "nowhere")


def test_a_config_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoraConfig().r = 4  # type: ignore[misc]
    assert LoraConfig().replace(r=4) == LoraConfig(r=4)
