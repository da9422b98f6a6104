"""Which texts are nearly the same as an earlier one: MinHash to find candidates, the true similarity to decide.

The similarity of two texts is the share of their runs of three words that both have (Jaccard). Finding pairs by
comparing all would take quadratic time; texts whose signatures agree in one of many bands are compared only.
Broder, "On the resemblance and containment of documents", 1997.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

RUN = 3  # words
_HASHES = 128
_MISSED = 0.01  # share of the pairs at the threshold that no band may find

# A letter of Chinese, Japanese or Korean counts as a word: they are written without blanks.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


def words(text: str) -> list[str]:
    """The words of a text, without case and punctuation."""
    return _WORD.findall(text.casefold())


def runs(text: str, length: int) -> set[str]:
    """The runs of `length` words in a text; of a shorter text, the whole."""
    found = words(text)
    if len(found) <= length:
        return {" ".join(found)}
    return {" ".join(found[i : i + length]) for i in range(len(found) - length + 1)}


def near_copies(texts: Iterable[str], similarity: float) -> Iterator[int | None]:
    """For each text the place of an earlier, kept one that is at least so similar, or None: then it is kept.

    The same texts give the same places in every process.
    """
    draw = np.random.default_rng(1997)
    factors = draw.integers(1, 2**63, size=_HASHES, dtype=np.uint64) | np.uint64(1)
    offsets = draw.integers(0, 2**63, size=_HASHES, dtype=np.uint64)
    rows = _rows_per_band(similarity)
    buckets: dict[tuple[int, bytes], list[int]] = {}
    kept: dict[int, npt.NDArray[np.uint32]] = {}
    for place, text in enumerate(texts):
        shingles = np.unique([zlib.crc32(run.encode("utf-8", "surrogatepass")) for run in runs(text, RUN)])
        signature = _signature(shingles.astype(np.uint64), factors, offsets)
        bands = [(start, signature[start : start + rows].tobytes()) for start in range(0, _HASHES, rows)]
        candidates = sorted({earlier for band in bands for earlier in buckets.get(band, ())})
        found = next((c for c in candidates if _jaccard(shingles, kept[c]) >= similarity), None)
        if found is None:
            kept[place] = shingles
            for band in bands:
                buckets.setdefault(band, []).append(place)
        yield found


def _signature(
    shingles: npt.NDArray[np.uint64], factors: npt.NDArray[np.uint64], offsets: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint32]:
    """The least of each hash over the shingles, [n] -> [_HASHES]."""
    least = np.full(_HASHES, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(shingles), 4096):  # bounds the memory for a text of a million words
        hashed = shingles[start : start + 4096, None] * factors + offsets  # modulo 2^64
        least = np.minimum(least, hashed.min(axis=0))
    return (least >> np.uint64(32)).astype(np.uint32)


def _rows_per_band(similarity: float) -> int:
    """The most hashes in a band with which a pair of just this similarity is still found."""
    for rows in (64, 32, 16, 8, 4, 2):
        if (1 - similarity**rows) ** (_HASHES // rows) <= _MISSED:
            return rows
    return 1


def _jaccard(a: npt.NDArray[np.uint32], b: npt.NDArray[np.uint32]) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)
