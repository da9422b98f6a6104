# ruff: noqa: F401, PLE0604  (imports for type checkers; __all__ is made of the table below)
"""The adapter engine. Names and files are PEFT's: change `from peft import` to `from nbtune.peft import` and go on.

Configs import no torch; everything is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nbtune.peft.config import LayerConfig, PeftConfig, PeftType, TaskType

if TYPE_CHECKING:
    from nbtune.modules.kbit import prepare_model_for_kbit_training
    from nbtune.peft.calibration import initialize_lora_eva_weights, replace_lora_weights_loftq
    from nbtune.peft.configs.lora import LoraConfig
    from nbtune.peft.hotswap import hotswap_adapter
    from nbtune.peft.layer import Adapter, AdapterLayer
    from nbtune.peft.model import (
        PeftModel,
        get_peft_model,
        get_peft_model_state_dict,
        inject_adapter_in_model,
        set_peft_model_state_dict,
    )
    from nbtune.peft.status import get_layer_status, get_model_status
    from nbtune.peft.targets import find_targets

_TASKS = (
    "CausalLM",
    "FeatureExtraction",
    "QuestionAnswering",
    "Seq2SeqLM",
    "SequenceClassification",
    "TokenClassification",
)
_HOMES = {
    "Adapter": ".layer",
    "AdapterLayer": ".layer",
    "AutoPeftModel": ".tasks",
    "PeftModel": ".model",
    "PromptEncoderReparameterizationType": ".configs.prompts",
    "PromptTuningInit": ".configs.prompts",
    "find_targets": ".targets",
    "get_layer_status": ".status",
    "get_model_status": ".status",
    "get_peft_model": ".model",
    "get_peft_model_state_dict": ".model",
    "hotswap_adapter": ".hotswap",
    "initialize_lora_eva_weights": ".calibration",
    "inject_adapter_in_model": ".model",
    "replace_lora_weights_loftq": ".calibration",
    "prepare_model_for_kbit_training": "nbtune.modules.kbit",
    "set_peft_model_state_dict": ".model",
    **{f"{kind}For{task}": ".tasks" for kind in ("AutoPeftModel", "PeftModel") for task in _TASKS},
    **{kind.config: f".configs.{kind.family}" for kind in PeftType},
}

__all__ = ["LayerConfig", "PeftConfig", "PeftType", "TaskType", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
