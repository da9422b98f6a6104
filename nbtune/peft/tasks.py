"""PEFT's classes by task, and those that find an adapter's base model themselves.

    model = AutoPeftModelForCausalLM.from_pretrained("adapter")     # the base model with its adapter

Nothing depends on the class: a `PeftModel` does all that these do. They only say which task an adapter is for.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from nbtune._transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from nbtune.errors import AdapterError
from nbtune.peft.checkpoint import LoadResult
from nbtune.peft.config import PeftConfig, TaskType, adapter_folder
from nbtune.peft.model import PeftModel

MODELS: dict[TaskType, type[PeftModel]] = {}
_BASES: dict[TaskType, Any] = {}


class _TaskModel(PeftModel):
    """A PeftModel whose new adapters are for one task; with the config given, it has one from the start."""

    task: ClassVar[TaskType]

    def __init_subclass__(cls, task: TaskType) -> None:
        super().__init_subclass__()
        cls.task, MODELS[task] = task, cls

    def __init__(self, model: nn.Module, peft_config: PeftConfig | None = None, adapter_name: str = "default") -> None:
        super().__init__(model)
        if peft_config is not None:
            self._add(adapter_name, peft_config, replace=True)
            self.set_adapter(adapter_name)

    def _add(self, name: str, config: PeftConfig, **how: Any) -> LoadResult:
        if isinstance(config, PeftConfig) and config.task_type is None and how.get("tensors") is None:
            config = config.replace(task_type=self.task)
        if isinstance(config, PeftConfig) and config.task_type not in (None, self.task):
            message = f"The adapter is for {config.task_type}, and {type(self).__name__} for {self.task}."
            raise AdapterError("Another task", message, "Use the class of that task, or PeftModel for any.")
        return super()._add(name, config, **how)


class PeftModelForCausalLM(_TaskModel, task=TaskType.CAUSAL_LM): ...


class PeftModelForSeq2SeqLM(_TaskModel, task=TaskType.SEQ_2_SEQ_LM): ...


class PeftModelForSequenceClassification(_TaskModel, task=TaskType.SEQ_CLS): ...


class PeftModelForTokenClassification(_TaskModel, task=TaskType.TOKEN_CLS): ...


class PeftModelForQuestionAnswering(_TaskModel, task=TaskType.QUESTION_ANS): ...


class PeftModelForFeatureExtraction(_TaskModel, task=TaskType.FEATURE_EXTRACTION): ...


class AutoPeftModel:
    """An adapter with the base model that its config names, for the task that it names."""

    task: ClassVar[TaskType | None] = None

    def __init_subclass__(cls, task: TaskType, base: Any) -> None:
        cls.task, _BASES[task] = task, base

    def __new__(cls) -> Self:
        message = f"{cls.__name__} only finds models."
        raise AdapterError("Not a model", message, f"Use {cls.__name__}.from_pretrained(adapter).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The adapter of a folder or hub repository on its base model, frozen unless `is_trainable`.

        `kwargs` are for the base model's from_pretrained; code that comes with a model is run only with
        `trust_remote_code=True` among them. Where the adapter's folder has a tokenizer with more tokens than the base
        model has embeddings, these grow. Raises AdapterError where the config does not say what the base model is.
        """
        folder = adapter_folder(pretrained_model_name_or_path, revision)
        config = PeftConfig.from_pretrained(folder)
        if config.base_model_name_or_path is None:
            message = f"base_model_name_or_path is null in {folder}."
            raise AdapterError("Unknown base model", message, "Load it yourself, then PeftModel.from_pretrained.")
        kwargs = {"trust_remote_code": False, **kwargs}
        kind = cls._base_class(config)
        base = kind.from_pretrained(config.base_model_name_or_path, revision=config.revision or "main", **kwargs)
        _fit_vocabulary(base, folder, kwargs["trust_remote_code"])
        task = cls.task or config.task_type
        model = PeftModel if task is None else MODELS[TaskType(task)]
        return model.from_pretrained(base, folder, adapter_name, is_trainable)

    @classmethod
    def _base_class(cls, config: PeftConfig) -> Any:
        if cls.task is not None and config.task_type not in (None, cls.task):
            message = f"The adapter is for {config.task_type}, and {cls.__name__} for {cls.task}."
            raise AdapterError("Another task", message, "Use the class of that task, or AutoPeftModel for any.")
        task = cls.task or config.task_type
        return _mapped_class(config.auto_mapping or {}) if task is None else _BASES[TaskType(task)]


def _mapped_class(mapping: dict[str, Any]) -> type[PreTrainedModel]:
    """The class that a config without a task names. Only transformers is looked into: an import can run any code."""
    library, name = str(mapping.get("parent_library")), str(mapping.get("base_model_class"))
    if library.split(".")[0] == "transformers":
        found = vars(importlib.import_module(library)).get(name)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    message = f"The adapter's config has no task_type, and its auto_mapping is {mapping}."
    raise AdapterError("Unknown base model", message, "Use the class of the task, such as AutoPeftModelForCausalLM.")


def _fit_vocabulary(base: Any, folder: Path, trust_remote_code: bool) -> None:
    if (folder / "tokenizer_config.json").is_file():
        tokens = len(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))
        if tokens > base.get_input_embeddings().num_embeddings:
            base.resize_token_embeddings(tokens)


class AutoPeftModelForCausalLM(AutoPeftModel, task=TaskType.CAUSAL_LM, base=AutoModelForCausalLM): ...


class AutoPeftModelForSeq2SeqLM(AutoPeftModel, task=TaskType.SEQ_2_SEQ_LM, base=AutoModelForSeq2SeqLM): ...


class AutoPeftModelForSequenceClassification(
    AutoPeftModel, task=TaskType.SEQ_CLS, base=AutoModelForSequenceClassification
): ...


class AutoPeftModelForTokenClassification(
    AutoPeftModel, task=TaskType.TOKEN_CLS, base=AutoModelForTokenClassification
): ...


class AutoPeftModelForQuestionAnswering(
    AutoPeftModel, task=TaskType.QUESTION_ANS, base=AutoModelForQuestionAnswering
): ...


class AutoPeftModelForFeatureExtraction(AutoPeftModel, task=TaskType.FEATURE_EXTRACTION, base=AutoModel): ...
