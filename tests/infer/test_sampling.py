from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, GenerationConfig

from nbtune.errors import NbtuneError
from nbtune.infer.families import FAMILIES, family_of
from nbtune.infer.sampling import (
    GREEDY,
    NEUTRAL,
    Sampler,
    Sampling,
    default_sampling,
    read_generation_config,
    settings_text,
)

CPU = torch.device("cpu")


def test_every_setting_has_help_and_a_range():
    for name, field in Sampling.model_fields.items():
        assert field.description, name
        assert field.metadata, name


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -1), ("top_p", 0), ("top_k", -1), ("min_p", 2), ("repetition_penalty", 0)]
)
def test_out_of_range_names_the_setting(name, value):
    with pytest.raises(NbtuneError, match=name):
        Sampling.of(**{name: value})


def test_the_models_own_settings_come_first_and_the_rest_is_neutral():
    defaults = default_sampling(GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, eos_token_id=2))
    assert defaults.sampling == NEUTRAL.model_copy(update={"temperature": 0.6, "top_p": 0.95})
    assert defaults.text == "temperature 0.6, top_p 0.95 from generation_config"


def test_a_model_that_names_none_gets_the_stated_default():
    defaults = default_sampling(GenerationConfig(eos_token_id=2))
    assert defaults.sampling == Sampling()
    assert defaults.text == "temperature 0.2, top_p 0.9 from nbtune's default"


QWEN3 = AutoConfig.for_model("qwen3")


def test_the_base_comes_before_the_family_and_after_the_model_itself():
    silent = GenerationConfig(eos_token_id=2)
    base = GenerationConfig(temperature=0.9, do_sample=True)
    assert (
        default_sampling(GenerationConfig(top_k=5, do_sample=True), base=base).text == "top_k 5 from generation_config"
    )
    assert default_sampling(silent, base=base, architecture=QWEN3).text == (
        "temperature 0.9 from the base's generation_config"
    )
    assert default_sampling(silent, base=silent, architecture=QWEN3).text == (
        "temperature 0.7, top_p 0.8, top_k 20, min_p 0 from the model card of Qwen3, without thinking"
    )
    assert default_sampling(silent, base=silent, architecture=AutoConfig.for_model("gpt2")).source == "nbtune's default"


def test_a_config_that_does_not_sample_is_greedy():
    defaults = default_sampling(GenerationConfig(do_sample=False, temperature=0.6, repetition_penalty=1.1))
    assert (defaults.sampling.greedy, defaults.sampling.repetition_penalty) == (True, 1.1)
    assert defaults.text == "greedy (temperature 0) from generation_config"


def test_a_value_out_of_range_is_passed_over_and_told():
    defaults = default_sampling(GenerationConfig(temperature=0.6, top_k=-1), architecture=QWEN3)
    assert defaults.sampling.top_k == 20
    assert defaults.text.endswith(
        "without thinking (generation_config is not used: top_k: Input should be greater than or equal to 0)"
    )


def test_every_family_is_known_by_its_config_and_its_settings_are_in_range():
    for family in FAMILIES:
        for model_type in family.model_types:
            config = AutoConfig.for_model(model_type)
            if family.vocabulary:
                config.vocab_size = family.vocabulary
            assert family_of(config) == family, model_type
        assert Sampling.of(**family.settings)


def test_families_of_one_architecture_are_told_apart_by_their_vocabulary():
    def name(size):
        family = family_of(AutoConfig.for_model("llama", vocab_size=size))
        return family and family.name

    assert [name(size) for size in (49152, 128256, 32000)] == ["SmolLM2", "Llama 3", None]


def test_an_adapters_own_file_is_read_and_a_broken_one_is_told(tmp_path):
    assert read_generation_config(tmp_path) is None
    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 0.4, "do_sample": true}')
    config = read_generation_config(tmp_path)
    assert config is not None
    assert default_sampling(config).text == "temperature 0.4 from generation_config"
    file.write_text('{"temperature": ')
    with pytest.raises(NbtuneError, match=r"cannot be read\n.*generation_config\.json"):
        read_generation_config(tmp_path)
    file.write_text("[1]")
    with pytest.raises(NbtuneError, match="cannot be read"):
        read_generation_config(tmp_path)


def test_settings_text():
    assert settings_text(GREEDY, ("temperature",)) == "greedy (temperature 0)"
    assert settings_text(Sampling(top_k=40), ("top_k", "top_p")) == "top_k 40, top_p 0.9"


def test_choices_follow_the_distribution_and_the_cuts():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    ids = torch.tensor([[0]])

    def seen(sampling, n=300):
        sampler = Sampler(sampling, 0, CPU)
        return [sampler(ids, logits.clone()) for _ in range(n)]

    assert set(seen(GREEDY)) == {0}
    assert set(seen(NEUTRAL)) == {0, 1, 2, 3}
    assert abs(seen(NEUTRAL, 2000).count(0) / 2000 - 0.5) < 0.05
    assert set(seen(Sampling(temperature=1, top_p=1, top_k=2))) == {0, 1}
    assert set(seen(Sampling(temperature=1, top_p=0.75))) == {0, 1}
    assert set(seen(Sampling(temperature=1, top_p=1, min_p=0.2))) == {0, 1, 2}
    assert set(seen(Sampling(temperature=0, repetition_penalty=2), 1)) == {1}
