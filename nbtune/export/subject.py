"""What is exported, in memory: the base model in floats, the adapter on it, and its tokenizer."""

from __future__ import annotations

import dataclasses
import gc
from typing import TYPE_CHECKING, Any

import torch

from nbtune._transformers import AutoTokenizer
from nbtune.models import Source, load
from nbtune.models.source import OnStatus
from nbtune.models.trained import Trained
from nbtune.peft import PeftModel
from nbtune.peft.config import PromptLearningConfig
from nbtune.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTER = "default"


@dataclasses.dataclass
class Subject:
    """A trained model in memory. `model` is a PeftModel, or the model itself where every weight was trained."""

    trained: Trained
    model: Any
    source: Source
    tokenizer: PreTrainedTokenizerBase

    @property
    def is_prompt(self) -> bool:
        """Whether the adapter is a trained prompt, which no weight can take in."""
        return isinstance(self.model, PeftModel) and isinstance(self.model.peft_config[ADAPTER], PromptLearningConfig)

    def merge(self) -> Any:
        """The base model with the adapter in its weights; `model` is that from now on."""
        if isinstance(self.model, PeftModel):
            self.model = self.model.merge_and_unload()
        return self.model

    def forget(self) -> None:
        """Give the model's memory back."""
        self.model = None
        gc.collect()


def float_spec(trained: Trained, dtype: str) -> ModelSpec:
    """The model that is exported, not quantised, in `dtype`."""
    changes: dict[str, Any] = {"load_in_4bit": False, "load_in_8bit": False, "dtype": dtype}
    if trained.whole:
        changes |= {"name": str(trained.folder), "revision": None}
    return trained.model.model_copy(update=changes)


def read(trained: Trained, spec: ModelSpec, device: torch.device | None, on_status: OnStatus) -> Subject:
    """Load `spec` and put the adapter on it. Raises ModelError or AdapterError where they do not fit."""
    loaded = load(spec, device=device, on_status=on_status)
    tokenizer = loaded.tokenizer
    if (trained.folder / "tokenizer_config.json").is_file():  # another template, or tokens that were added
        tokenizer = AutoTokenizer.from_pretrained(trained.folder, local_files_only=True)
    model = loaded.model if trained.whole else PeftModel.from_pretrained(loaded.model, trained.folder)
    return Subject(trained, model.eval(), loaded.source, tokenizer)
