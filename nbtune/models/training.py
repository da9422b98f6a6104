"""A base model as a run trains it: its precision, its attention, and what casts it. For the run and for its plan."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from nbtune.errors import ModelError
from nbtune.spec import ModelSpec, RunSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def trained_model(spec: RunSpec) -> ModelSpec:
    """The model as it is trained: with every weight trained, the weights are fp32 and the forward pass is cast."""
    if spec.method == "full" and spec.model.dtype == "auto":
        return spec.model.model_copy(update={"dtype": "float32"})
    return spec.model


def prepare_for_training(model: PreTrainedModel) -> None:
    """Turn the key/value cache off and give `model` nbtune's attention over packed rows.

    Raises ModelError for an architecture whose packed examples would see each other.
    """
    from nbtune.kernels import attention

    attention.register()
    model.config.use_cache = False
    model.set_attn_implementation(attention.NAME)
    # transformers only logs a warning for a model whose attention cannot be chosen, and leaves it as it was.
    if model.config._attn_implementation != attention.NAME:
        why = "does not let its attention be chosen (transformers' attention interface)"
    elif model._is_stateful:
        why = "carries a state from token to token"
    else:
        return
    raise ModelError(
        "This architecture cannot be trained",
        f"{type(model).__name__} {why}, so packed examples would see each other.",
        "Choose a model with attention in all its layers, such as Llama, Qwen3 or SmolLM2.",
    )


def precision(model: torch.nn.Module, device_type: str, compute_dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Autocast where fp32 weights are to be computed with in half precision (full fine-tuning); nothing otherwise."""
    import torch

    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes == {torch.float32} and compute_dtype != torch.float32:
        return torch.autocast(device_type, compute_dtype)
    return nullcontext()
