from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from nbtune.errors import NbtuneError
from nbtune.infer.sampling import GREEDY, NEUTRAL, Sampler, Sampling, default_sampling, settings_text

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
