"""Base models: where their weights are, what they look like inside, and loading them for this machine.

    info = describe(ModelSpec(name="smollm2-135m-instruct"))
    loaded = load(ModelSpec(name="smollm2-135m-instruct"), for_training=True)
    loaded.model, loaded.tokenizer

`describe` reads no weights. torch and transformers are imported when a function first needs them.
"""

from nbtune.models.adapter import attach_adapter
from nbtune.models.info import ModelInfo, ModuleInfo, describe, skeleton
from nbtune.models.known import Known, known_models
from nbtune.models.loader import LoadedModel, load, load_tokenizer
from nbtune.models.machine import available_memory, compute_dtype, default_device, missing_compiler
from nbtune.models.source import Source, resolve

__all__ = [
    "Known",
    "LoadedModel",
    "ModelInfo",
    "ModuleInfo",
    "Source",
    "attach_adapter",
    "available_memory",
    "compute_dtype",
    "default_device",
    "describe",
    "known_models",
    "load",
    "load_tokenizer",
    "missing_compiler",
    "resolve",
    "skeleton",
]
