"""`prepare_model_for_kbit_training`, by PEFT's name, for a model that bitsandbytes quantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbtune._transformers import PreTrainedModel
from nbtune.modules.quantised import is_quantised, keep_unpacked

_HALVES = (torch.float16, torch.bfloat16)


def prepare_model_for_kbit_training(
    model: PreTrainedModel,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Make a quantised model ready to train an adapter on, in place, and return it.

    All its parameters are frozen. Norms and what else is in 16 bits and not quantised go to fp32, and hidden states
    are fp32 from the embedding to the last norm. The embedding and the output head, which on a small model with a
    large vocabulary are most of its memory, stay in 16 bits: the embedding's output is cast, and the head's input.
    PEFT casts their weights, which adds 2 bytes a weight and nothing to the precision of frozen weights.

    With `use_gradient_checkpointing` a quantised model recomputes its activations in the backward pass, and the
    embedding's output requires a gradient, without which a reentrant checkpoint gives none.
    `gradient_checkpointing_kwargs` are those of torch.utils.checkpoint.
    """
    model.requires_grad_(False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    kept = {id(weight) for module in (embedding, head) if module is not None for weight in module.parameters()}
    quantised = False
    for module in model.modules():
        keep_unpacked(module)
        if is_quantised(module):  # it casts its bias itself
            quantised = True
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dtype in _HALVES and id(parameter) not in kept:
                parameter.data = parameter.data.float()
    if embedding.weight.dtype in _HALVES:
        embedding.register_forward_hook(lambda _module, _args, output: output.float())
        if head is not None:
            head.register_forward_pre_hook(_cast_input)
    if quantised and use_gradient_checkpointing:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable(gradient_checkpointing_kwargs)
    return model


def _cast_input(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].to(module.weight.dtype), *args[1:])
