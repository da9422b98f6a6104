"""A run's adapter on its base model."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from nbtune.models.source import fetch, resolve
from nbtune.peft.configs.prompts import PromptTuningConfig, PromptTuningInit
from nbtune.spec import RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nbtune.peft import PeftModel


def attach_adapter(model: PreTrainedModel, spec: RunSpec, name: str = "default") -> PeftModel:
    """`get_peft_model` with the run's method, beside the adapters of other names that the model has.

    A text that a prompt begins with is read by the model's own tokenizer if no other is named. Raises AdapterError
    where the method does not fit the model.
    """
    from nbtune.peft import get_peft_model

    method = spec.method
    assert method != "full"
    if not isinstance(method, PromptTuningConfig) or method.tokenizer_name_or_path:
        return get_peft_model(model, method, name)
    if method.prompt_tuning_init != PromptTuningInit.TEXT:
        return get_peft_model(model, method, name)
    folder = fetch(resolve(spec.model), with_weights=False)
    adapted = get_peft_model(model, method.replace(tokenizer_name_or_path=str(folder)), name)
    # The adapter's file names the model: a folder of this machine's cache would mean nothing elsewhere.
    configs = adapted.peft_config
    configs[name] = configs[name].replace(tokenizer_name_or_path=model.name_or_path or spec.model.name)
    return adapted


def save_adapter(model: PeftModel, name: str, folder: Path, **options: Any) -> None:
    """Write one of a model's adapters, not the one called `default`, into `folder` as if it were the only one.

    `options` are those of `PeftModel.save_pretrained`, which gives each adapter a folder of its name.
    """
    from nbtune.peft import PeftModel

    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".") as temporary:
        PeftModel.save_pretrained(model, temporary, selected_adapters=[name], **options)
        for file in (Path(temporary) / name).iterdir():
            file.replace(folder / file.name)
