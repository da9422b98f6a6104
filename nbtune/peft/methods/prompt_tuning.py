"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): [P; X], trained embeddings P before those of the text."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from nbtune._transformers import AutoTokenizer
from nbtune.errors import AdapterError
from nbtune.modules.base import compute_dtype, empty
from nbtune.peft.configs.prompts import PromptTuningConfig, PromptTuningInit
from nbtune.peft.prompt import Prompt


class PromptTuning(Prompt):
    """P [num_virtual_tokens * submodules, token_dim]: normal at first, or the embeddings of tokens of the vocabulary.

    The paper finds that the embeddings of words, best of words for the task, are the better start for small models.
    """

    @classmethod
    def create(cls, base: Any, config: PromptTuningConfig, path: str, shared: None) -> Self:
        count = config.num_virtual_tokens * (config.num_transformer_submodules or 1)
        if config.inference_mode or config.prompt_tuning_init == PromptTuningInit.RANDOM:
            return cls(nn.init.normal_(empty(base, count, config.token_dim or base.embedding_dim)), config)
        if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
            ids = torch.randint(0, base.num_embeddings, (count,))
        else:
            ids = _ids_of_text(config, count)
        with torch.no_grad():
            embeddings = base(ids.to(base.weight.device))
        return cls(embeddings.to(compute_dtype(base), copy=True), config)


def _ids_of_text(config: PromptTuningConfig, count: int) -> Tensor:
    """The text's tokens, repeated or cut to `count`. A tokenizer's own code is never run."""
    kwargs = {**(config.tokenizer_kwargs or {}), "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **kwargs)
    except (OSError, ValueError) as error:
        message = f"tokenizer_name_or_path is {config.tokenizer_name_or_path!r}: {error}"
        raise AdapterError(
            "No tokenizer for the first prompt", message, "Give a tokenizer's folder or name."
        ) from error
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise AdapterError("An empty first prompt", f"{config.prompt_tuning_init_text!r} has no tokens.")
    return torch.tensor(ids).repeat(-(-count // len(ids)))[:count]
