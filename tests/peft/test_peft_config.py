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
from nbtune.peft import LayerConfig, LoraConfig, PeftConfig, PeftType, TaskType
from nbtune.peft.config import config_class
from nbtune.spec import RunSpec, settings

# What PEFT's configs need; ours may wait for the steps, which a run knows, and have 20 virtual tokens.
TOKENS = {"num_virtual_tokens": 7}
NEEDED = {"ADALORA": {"total_step": 10}, "PROMPT_TUNING": TOKENS, "PREFIX_TUNING": TOKENS, "P_TUNING": TOKENS}
# Who the adapter is and what is read off the base model: no choices of a user.
FACTS = set(
    "task_type base_model_name_or_path revision inference_mode auto_mapping peft_version extra fan_in_fan_out "
    "token_dim num_transformer_submodules num_attention_heads num_layers megatron_core qalora_group_size".split()
)


def ours_and_peft(peft_type: str) -> tuple[PeftConfig, peft.PeftConfig]:
    """Both configs of a method at their defaults."""
    settings = NEEDED.get(peft_type, {})
    ours = config_class(peft_type)
    return ours(**settings), vars(peft)[ours.__name__](**settings)


def choices(config: type[PeftConfig]) -> list[dataclasses.Field]:
    """The fields that a user chooses."""
    return [field for field in dataclasses.fields(config) if "help" in field.metadata]


def wrong_values(field: dataclasses.Field):
    """Values that a setting cannot have: of no type of JSON, and just beyond its limits."""
    yield object()
    limits = {"ge": -1, "gt": 0, "le": 1, "lt": 0}
    yield from (field.metadata[limit] + step for limit, step in limits.items() if limit in field.metadata)


def test_importing_the_room_and_its_configs_does_not_import_torch():
    code = "import sys, nbtune.peft; nbtune.peft.LoraConfig(r=2); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_are_found_and_unknown_ones_are_not():
    assert all(getattr(nbtune.peft, name) is not None for name in nbtune.peft.__all__)
    with pytest.raises(AttributeError, match="no attribute 'get_pft_model'"):
        _ = nbtune.peft.get_pft_model


@pytest.mark.parametrize("peft_type", PeftType)
def test_names_and_defaults_are_those_of_peft(peft_type):
    ours, theirs = (json.loads(json.dumps(config.to_dict())) for config in ours_and_peft(peft_type))
    if peft_type != "OFT":  # a file of OFT without a version means another series
        assert ours.pop("peft_version") is None  # written by who saves
        assert theirs.pop("peft_version") == peft.__version__
    assert ours == theirs
    booleans = {name for name, value in theirs.items() if isinstance(value, bool)}
    assert booleans == {name for name, value in ours.items() if isinstance(value, bool)}  # 0 == False


@pytest.mark.parametrize("peft_type", PeftType)
def test_files_are_read_both_ways_by_the_method_that_they_name(peft_type, tmp_path):
    ours, theirs = ours_and_peft(peft_type)
    theirs.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == ours.replace(peft_version=peft.__version__)
    ours.replace(peft_version=peft.__version__).save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path) == theirs


@pytest.mark.parametrize("peft_type", PeftType)
def test_every_config_survives_a_dict_json_and_yaml(peft_type, tmp_path):
    chosen = {"task_type": TaskType.CAUSAL_LM, "revision": "main", **NEEDED.get(peft_type, {})}
    if issubclass(config_class(peft_type), LayerConfig):
        chosen["target_modules"] = {"v_proj", "q_proj"}
    config = config_class(peft_type)(**chosen)
    assert PeftConfig.from_dict(config.to_dict()) == config
    assert PeftConfig.from_dict(json.loads(config.to_json())) == config
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert PeftConfig.from_yaml_file(tmp_path / "config.yaml") == config
    (tmp_path / "spec.yaml").write_text(RunSpec(method=config).to_yaml())
    assert RunSpec.from_yaml(tmp_path / "spec.yaml").method == config
    assert config.changes().keys() == chosen.keys()


@pytest.mark.parametrize("peft_type", PeftType)
def test_every_setting_is_a_choice_with_help_a_fact_or_pending(peft_type):
    config = config_class(peft_type)
    for field in dataclasses.fields(config):
        kinds = [bool(field.metadata.get("help")), "pending" in field.metadata, field.name in FACTS]
        unused = peft_type == "ADALORA" and field.name in ("r", "rank_pattern")
        assert sum(kinds) == (not unused), field.name
    assert all("<" not in field.metadata["help"] for field in choices(config))  # shown as HTML
    assert {setting.name for setting in settings(config) if setting.part == "method"} == {
        field.name for field in choices(config)
    }


@pytest.mark.parametrize("peft_type", PeftType)
def test_a_wrong_value_of_any_setting_is_refused_by_its_name(peft_type):
    config = config_class(peft_type)
    for field in choices(config):
        for value in wrong_values(field):
            with pytest.raises(AdapterError, match=rf"{field.name} is .*; it must be"):
                config(**{field.name: value})


@pytest.mark.parametrize(
    ("peft_type", "settings", "message"),
    [
        ("ADALORA", {"total_step": 0}, "total_step is 0; it must be more than 0"),
        ("ADALORA", {"total_step": 9, "tinit": 5, "tfinal": 4}, "tinit 5 and tfinal 4 leave nothing of total_step 9"),
        ("ADALORA", {"use_dora": True}, "use_dora is True; nbtune cannot do this yet"),
        ("ADALORA", {"bias": "adalora_only"}, "'none', 'all', 'lora_only'"),
        ("IA3", {"feedforward_modules": "(q"}, "feedforward_modules is '(q'; it must be a regular expression"),
        ("IA3", {"target_modules": ["q"], "feedforward_modules": ["up"]}, "up: named in feedforward_modules"),
        ("BEFT", {"layers_pattern": "h"}, "only says where layers_to_transform counts"),
        ("TRAINABLE_TOKENS", {"token_indices": [1, 1]}, "token_indices is [1, 1]"),
        ("TRAINABLE_TOKENS", {"token_indices": [-1]}, "token_indices is [-1]"),
        ("TRAINABLE_TOKENS", {"modules_to_save": ["head"]}, "is no setting of TRAINABLE_TOKENS"),
        ("OFT", {"r": 4}, "r is 4; it must be 0 if oft_block_size (32)"),
        ("OFT", {"oft_block_size": 0}, "r is 0"),
        ("BOFT", {"boft_block_num": 2}, "boft_block_num is 2; it must be 0 if boft_block_size (4)"),
        ("BOFT", {"bias": "lora_only"}, "'none', 'all', 'boft_only'"),
        ("ROAD", {"group_size": 3}, "group_size is 3; it must be even"),
        ("LOKR", {"decompose_factor": 0}, "decompose_factor is 0; it must be -1 or at least 1"),
        ("LOHA", {"init_weights": "lycoris"}, "init_weights is 'lycoris'; it must be one of True, False"),
        ("GRALORA", {"r": 5}, "r is 5; it must be a multiple of gralora_k, 2"),
        ("DELORA", {"lambda_pattern": {"q": 0}}, "lambda_pattern['q'] is 0; it must be more than 0"),
        ("MISS", {"bias": "miss_only"}, "'none', 'all', 'MiSS_only'"),
        ("VBLORA", {"topk": 300}, "topk is 300; it must be at most num_vectors, which is 256"),
        ("FOURIERFT", {"bias": "fourierft_only"}, "'none', 'all', 'fourier_only'"),
        ("WAVEFT", {"wavelet_family": "bior1.1"}, "wavelet_family is 'bior1.1'; it must be one of 'db1'"),
        ("SHIRA", {"mask_type": "snip"}, "mask_type is 'snip'; it must be 'random'"),
        ("PROMPT_TUNING", {"prompt_tuning_init": "TEXT"}, "prompt_tuning_init_text is None; it must be given"),
        ("PROMPT_TUNING", {"tokenizer_kwargs": {"a": 1}}, "is only for prompt_tuning_init TEXT"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(peft_type, settings, message):
    with pytest.raises(AdapterError) as caught:
        config_class(peft_type)(**settings)
    assert message in str(caught.value)


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
        ({"init_lora_weights": "pizza"}, "must be one of True, False, 'gaussian'"),
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
    peft.LoraConfig(target_modules=["q"], use_qalora=True).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="use_qalora is True"):
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
