"""How like an answer is to its reference: the same, or how many words they share (ROUGE; Lin, 2004).

Words are runs of letters and digits, in lower case, without stemming; in scripts that put no spaces between words each
sign is a word.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence

_SIGNS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # kana and Han
_WORD = re.compile(rf"[{_SIGNS}]|[^\W_{_SIGNS}]+")


def words(text: str) -> list[str]:
    """The words that ROUGE counts."""
    return _WORD.findall(text.lower())


def same(answer: str, reference: str) -> bool:
    """Whether they differ in white space and case at most."""
    return answer.casefold().split() == reference.casefold().split()


def rouge_1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of the words that both have, 0 to 1."""
    shared = collections.Counter(answer) & collections.Counter(reference)
    return _f1(shared.total(), len(answer), len(reference))


def rouge_l(answer: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of the longest sequence of words that both have in this order, 0 to 1."""
    return _f1(_longest_common(answer, reference), len(answer), len(reference))


def _f1(shared: int, answered: int, wanted: int) -> float:
    return 2 * shared / (answered + wanted) if shared else 0.0


def _longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, a bit for each word of `one` (Hyyrö, 2004)."""
    places: dict[str, int] = collections.defaultdict(int)
    for index, word in enumerate(one):
        places[word] |= 1 << index
    every = unmatched = (1 << len(one)) - 1
    for word in other:
        matched = unmatched & places.get(word, 0)
        unmatched = ((unmatched + matched) | (unmatched - matched)) & every
    return len(one) - unmatched.bit_count()
