"""The parts of transformers that nbtune uses, safe to import from several threads at once.

When its import ends, transformers replaces itself in `sys.modules`. A thread whose `from transformers import ...`
waited for that import then looks into the module that was replaced, and fails. `import_module` takes the one that is
there when the wait is over; whoever imports this module waits for all of it.
"""

import importlib

importlib.import_module("transformers")

from transformers import (  # noqa: E402 - see above
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D  # noqa: E402

__all__ = [
    "AttentionInterface",
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoTokenizer",
    "BitsAndBytesConfig",
    "Conv1D",
    "DynamicCache",
    "EncoderDecoderCache",
    "PreTrainedModel",
    "PreTrainedTokenizerFast",
]
