"""Whether what was written answers as the adapter in memory does: the same prompts through both, logits compared.

before = answer(model, prompts)          # the adapter in memory
proof = compare(before, answer(read_back, prompts), bound=0.02, read_by="transformers")
proof.holds, proof.largest_difference, proof.greedy_agree
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nbtune._transformers import DynamicCache
from nbtune.errors import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTIONS = (
    "What does os.path.join do?",
    "Write one sentence about the sea, then count from 1 to 12.",
    "Translate to French: I'd like 250 g of bread — and café, please!",
    "def add(a, b):\n    return a + b\n\nExplain   this code.",
)
NEW_TOKENS = 12  # greedy tokens after each prompt


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model says to the prompts."""

    logits: list[Tensor]  # one a prompt: [T, V], float32
    greedy: list[list[int]]  # one a prompt: the likeliest next tokens


@dataclasses.dataclass(frozen=True)
class Proof:
    """How far the written model is from the adapter in memory."""

    read_by: str  # what read the file back
    prompts: int
    positions: int  # tokens whose logits were compared
    largest_difference: float  # of two logits
    relative_difference: float  # |difference| / |logits|, Frobenius norms, logits centred over the vocabulary
    bound: float  # on the relative difference
    greedy_tokens: int
    greedy_agree: int  # of them the same, up to the first that is not

    @property
    def holds(self) -> bool:
        return self.relative_difference <= self.bound  # false for nan

    def __str__(self) -> str:
        agree = "all" if self.greedy_agree == self.greedy_tokens else f"{self.greedy_agree} of"
        return (
            f"largest logit difference {self.largest_difference:.2g}, relative {self.relative_difference:.2g} "
            f"(bound {self.bound:g}); {agree} {self.greedy_tokens} greedy tokens agree; read by {self.read_by}"
        )


def sample_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The questions as the chat template writes them; as they are where there is no template.

    Raises ExportError where the template refuses a single question.
    """
    if tokenizer.chat_template is None:
        return list(QUESTIONS)
    import jinja2

    try:
        return [
            str(tokenizer.apply_chat_template(_chat(question), add_generation_prompt=True, tokenize=False))
            for question in QUESTIONS
        ]
    except jinja2.TemplateError as error:
        raise ExportError(
            "The chat template refuses a question", str(error), "Choose another chat template."
        ) from error


def tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of each text; no special tokens are added, for templates write them."""
    encoded: Any = tokenizer(list(texts), add_special_tokens=False)
    return encoded["input_ids"]


@torch.inference_mode()
def answer(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int = NEW_TOKENS) -> Answers:
    """The logits of every prompt token and the greedy tokens after it, one prompt after the other."""
    model.eval()
    logits, greedy = [], []
    for prompt in prompts:
        cache = DynamicCache(config=model.config)
        ids = torch.tensor([prompt], device=model.device)
        found = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0].float()  # [T, V]
        logits.append(found.cpu())
        chosen = [int(found[-1].argmax())]
        while len(chosen) < new_tokens:
            ids = torch.tensor([chosen[-1:]], device=model.device)
            found = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0]
            chosen.append(int(found[-1].argmax()))
        greedy.append(chosen)
    return Answers(logits, greedy)


def compare(expected: Answers, found: Answers, *, bound: float, read_by: str) -> Proof:
    """The proof that `found` is `expected` within `bound`."""
    largest = error = size = 0.0
    for one, other in zip(expected.logits, found.logits, strict=True):
        difference = other - one
        largest = max(largest, float(difference.abs().max())) if not difference.isnan().any() else float("nan")
        error += float(difference.double().square().sum())
        size += float((one - one.mean(dim=-1, keepdim=True)).double().square().sum())
    pairs = list(zip(expected.greedy, found.greedy, strict=True))
    return Proof(
        read_by=read_by,
        prompts=len(pairs),
        positions=sum(len(one) for one in expected.logits),
        largest_difference=largest,
        relative_difference=(error / size) ** 0.5 if size else error,
        bound=bound,
        greedy_tokens=sum(len(one) for one, _ in pairs),
        greedy_agree=sum(_common(one, other) for one, other in pairs),
    )


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two answers begin with in common."""
    pairs = list(zip(one, other, strict=True))
    return next((index for index, (left, right) in enumerate(pairs) if left != right), len(pairs))


def _chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]
