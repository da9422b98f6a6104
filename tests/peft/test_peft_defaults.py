"""Our table of default targets against all of PEFT's."""

from __future__ import annotations

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.ia3.model import IA3Model
from peft.utils import constants

from nbtune.modules.defaults import default_feedforward, default_targets

METHODS = (
    "LORA ADALORA IA3 LN_TUNING BEFT OFT BOFT HRA LOHA LOKR VERA RANDLORA FOURIERFT WAVEFT C3A VBLORA SHIRA HIRA MISS "
    "GRALORA ROAD DELORA"
).split()
LORA = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
IA3 = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
FEEDFORWARD = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
MODEL_TYPES = sorted({*LORA, *IA3, *constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING, "no-such-model"})


def table_of_peft(method: str) -> dict[str, list[str] | str]:
    """The table that the tuner itself reads, whatever its name."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType[method]]
    return IA3 if tuner is IA3Model else tuner.target_module_mapping


@pytest.mark.parametrize("method", METHODS)
def test_every_entry_is_that_of_peft(method):
    table = table_of_peft(method)
    assert len(table) >= 17
    assert {*table} <= {*MODEL_TYPES}
    for model_type in MODEL_TYPES:
        assert default_targets(method, model_type) == table.get(model_type), model_type


def test_the_feedforward_modules_of_ia3_are_those_of_peft():
    assert len(FEEDFORWARD) == 27
    for model_type in MODEL_TYPES:
        assert default_feedforward(model_type) == FEEDFORWARD.get(model_type), model_type


def test_a_method_without_a_table_has_no_defaults():
    assert default_targets("TRAINABLE_TOKENS", "llama") is None
