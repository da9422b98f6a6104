"""A tokenizer as GGUF keeps it: tokens with types, and merges (byte-level BPE) or scores (SentencePiece).

llama.cpp splits text before byte-level merges by rules that it knows by a name (`tokenizer.ggml.pre`). The name is told
here by the tokenizer's own rules; where they are none of those below, nothing is written.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
from transformers.integrations.gguf import read_gguf_metadata

from nbtune._transformers import PreTrainedTokenizerFast
from nbtune.errors import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT_LISTS = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")
_SPACE = "▁"  # SentencePiece's

# What text is split by before merging.
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_THREE, _ONE = r"\p{N}{1,3}", r"\p{N}"


def _split(*patterns: str) -> tuple[tuple[str, Any], ...]:
    return (("Split", "|".join(patterns)), ("ByteLevel", False))


# The steps before merging, and whether words that are tokens skip the merges -> llama.cpp's name.
_PRE = {
    ((("ByteLevel", True),), False): "gpt-2",
    ((("Digits", True), ("ByteLevel", True)), False): "smollm",
    (_split(_ENDINGS, _WORD, _THREE, _SIGNS, _SPACES), True): "llama-bpe",
    (_split(_ENDINGS, _WORD, _THREE, _SIGNS, _SPACES), False): "dbrx",
    (_split(_ENDINGS, _WORD, _ONE, _SIGNS, _SPACES), False): "qwen2",
    (_split(_LOWER, _UPPER, _ONE, _PATHS, _SPACES), True): "tekken",
    (_split(f"{_LOWER}{_ENDINGS}?", f"{_UPPER}{_ENDINGS}?", _THREE, _PATHS, _SPACES), False): "gpt-4o",
}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What GGUF's `tokenizer.ggml.*` says."""

    model: str  # "gpt2": byte-level BPE; "llama": SentencePiece
    pre: str
    tokens: list[str]
    types: list[gguf.TokenType]
    merges: list[str]
    scores: list[float] | None  # SentencePiece's: the higher is merged first
    special: dict[str, int]  # bos, eos, unk, pad
    adds: dict[str, bool]  # whether bos, eos are put around a text
    space_prefix: bool

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Write it."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        add = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "unk": writer.add_unk_token_id,
               "pad": writer.add_pad_token_id}  # fmt: skip
        for name, number in self.special.items():
            add[name](number)
        writer.add_add_bos_token(self.adds["bos"])
        writer.add_add_eos_token(self.adds["eos"])
        if self.model == "llama":
            writer.add_add_space_prefix(self.space_prefix)


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer, filled up to the `size` rows of the embedding.

    Raises ExportError for a tokenizer that GGUF cannot hold, or that has more tokens than the embedding.
    """
    rules = _rules(tokenizer)
    if rules["model"]["type"] != "BPE":
        raise _unfit(f"It is a {rules['model']['type']} model; llama.cpp's are BPE and SentencePiece's BPE.")
    if len(tokenizer) > size:
        raise _unfit(f"It has {len(tokenizer):,} tokens, the embedding {size:,} rows.")
    steps = _steps(rules["pre_tokenizer"])
    bytes_ = _has_bytes(steps)
    tokens, types = _tokens(rules, size, bytes_)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in rules["model"]["merges"]]
    ids: dict[str, Any] = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unk": tokenizer.unk_token_id,
           "pad": tokenizer.pad_token_id}  # fmt: skip
    around: Any = tokenizer("a")["input_ids"]
    return Vocabulary(
        model="gpt2" if bytes_ else "llama",
        pre=_pre(steps, bool(rules["model"].get("ignore_merges"))) if bytes_ else "default",
        tokens=tokens,
        types=types,
        merges=merges if bytes_ else [],
        scores=None if bytes_ else _scores(tokens, types, merges),
        special={name: number for name, number in ids.items() if number is not None},
        adds={"bos": around[0] == ids["bos"], "eos": around[-1] == ids["eos"]},
        space_prefix=_puts_space_first(rules),
    )


def is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it merges bytes (GPT-2's way), not characters (SentencePiece's)."""
    return _has_bytes(_steps(_rules(tokenizer)["pre_tokenizer"]))


def copy(path: Path, writer: gguf.GGUFWriter) -> None:
    """Write the tokenizer of another GGUF file as it stands there, all but its chat template."""
    values, _ = read_gguf_metadata(str(path), _TEXT_LISTS)  # gguf's own reader takes seconds for a vocabulary
    for key, value in values.items():
        if not key.startswith("tokenizer.ggml."):
            continue
        if key.endswith("_token_id"):
            writer.add_uint32(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)


def _rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What tokenizer.json says."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _unfit(f"It is a {type(tokenizer).__name__}.")
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _has_bytes(steps: list[tuple[str, Any]]) -> bool:
    return any(name == "ByteLevel" for name, _ in steps)


def _steps(step: dict[str, Any] | None) -> list[tuple[str, Any]]:
    """The pre-tokenizer's steps, flat, each with what matters of it."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step["pretokenizers"] for inner in _steps(part)]
    if step["type"] == "Split":
        return [("Split", step["pattern"].get("Regex") or step["pattern"].get("String"))]
    if step["type"] == "Digits":
        return [("Digits", step["individual_digits"])]
    return [(step["type"], step.get("use_regex"))]


def _pre(steps: list[tuple[str, Any]], whole_words: bool) -> str:
    found = _PRE.get((tuple(steps), whole_words))
    if found is None:
        raise _unfit(f"Its rules for splitting text are none of {', '.join(dict.fromkeys(_PRE.values()))}: {steps}.")
    return found


def _tokens(rules: dict[str, Any], size: int, bytes_: bool) -> tuple[list[str], list[gguf.TokenType]]:
    """The tokens by id, and what kind each is; ids that no token has are named and marked as unused."""
    kinds = gguf.TokenType
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [kinds.UNUSED] * size
    for token, number in rules["model"]["vocab"].items():
        tokens[number], types[number] = token, kinds.NORMAL
        if not bytes_ and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            types[number] = kinds.BYTE
    for added in rules["added_tokens"]:
        number, token = added["id"], added["content"]
        special = added["special"]
        types[number] = kinds.CONTROL if special else kinds.USER_DEFINED
        # llama.cpp looks for these in the text itself, before spaces are respelled.
        tokens[number] = token if special or bytes_ else token.replace(_SPACE, " ")
    unknown = rules["model"].get("unk_token")
    if not bytes_ and unknown in rules["model"]["vocab"]:
        types[rules["model"]["vocab"][unknown]] = kinds.UNKNOWN
    return tokens, types


def _scores(tokens: list[str], types: list[gguf.TokenType], merges: list[str]) -> list[float]:
    """Minus the rank of the first merge that makes a token, so that merging by score is merging by rank."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    last = len(merges)
    return [
        -float(ranks.get(token, last)) if kind == gguf.TokenType.NORMAL else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]


def _puts_space_first(rules: dict[str, Any]) -> bool:
    """Whether a text begins with a space that is not there."""
    text = json.dumps([rules["normalizer"], rules["pre_tokenizer"]])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _unfit(why: str) -> ExportError:
    return ExportError("This tokenizer cannot be written as GGUF", why, "Export the merged model.")
