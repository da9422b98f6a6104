"""A run's adapter on its base model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbtune.models.source import fetch, resolve
from nbtune.peft.configs.prompts import PromptTuningConfig, PromptTuningInit
from nbtune.spec import RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nbtune.peft import PeftModel


def attach_adapter(model: PreTrainedModel, spec: RunSpec) -> PeftModel:
    """`get_peft_model` with the run's method.

    A text that a prompt begins with is read by the model's own tokenizer if no other is named. Raises AdapterError
    where the method does not fit the model.
    """
    from nbtune.peft import get_peft_model

    method = spec.method
    assert method != "full"
    if not isinstance(method, PromptTuningConfig) or method.tokenizer_name_or_path:
        return get_peft_model(model, method)
    if method.prompt_tuning_init != PromptTuningInit.TEXT:
        return get_peft_model(model, method)
    folder = fetch(resolve(spec.model), with_weights=False)
    adapted = get_peft_model(model, method.replace(tokenizer_name_or_path=str(folder)))
    # The adapter's file names the model: a folder of this machine's cache would mean nothing elsewhere.
    configs = adapted.peft_config
    configs["default"] = configs["default"].replace(tokenizer_name_or_path=model.name_or_path or spec.model.name)
    return adapted
