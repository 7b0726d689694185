"""Near duplicates among texts: candidates by MinHash-LSH, decided by the exact Jaccard similarity of their shingles.

A pair that LSH does not propose is missed. With ``b`` bands of ``r`` rows a pair of similarity ``s`` is proposed with
probability ``1 - (1 - s^r)^b`` (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, section 3.4); :func:`bands_of`
chooses them so that at the threshold at most one pair in a thousand is missed. What is proposed is compared exactly,
so no pair below the threshold is called a duplicate.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_align.errors import InputError, require

SHINGLE = 5  # characters
PERMUTATIONS = 128  # hash functions; the index takes about 11 KB a text
MISSED = 1e-3  # most of the pairs at the threshold that LSH may miss


class NearDuplicates:
    """Finds for each text an earlier, distinct one that it is a near duplicate of.

    Args:
        threshold: Jaccard similarity from which two texts are near duplicates; 1: only texts with equal shingles.

    Raises:
        InputError: datasketch is not installed, or the threshold is not in (0, 1].
    """

    def __init__(self, threshold: float) -> None:
        require(0 < threshold <= 1, f"duplicates: the threshold must be in (0, 1], got {threshold}")
        try:
            from datasketch import MinHash, MinHashLSH  # an optional package
        except ImportError as error:
            raise InputError(
                "near duplicates need the package datasketch: pip install 'megatron-align[pas]'"
            ) from error
        self._threshold, self._empty = threshold, MinHash(num_perm=PERMUTATIONS)
        self._lsh = MinHashLSH(num_perm=PERMUTATIONS, params=bands_of(threshold))
        self._kept: list[tuple[Any, str]] = []  # keys and texts, by number in the index

    def add(self, key: Any, text: str) -> Any | None:
        """Return the key of an earlier text that this one duplicates, the most similar; None: it is distinct, and kept.

        Args:
            key: of the text, not None.
            text: any.
        """
        shingles = shingles_of(text)
        signature = self._empty.copy()
        signature.update_batch([shingle.encode("utf-8", "surrogatepass") for shingle in shingles])
        found, best = None, 0.0
        for other in sorted(self._lsh.query(signature)):  # numbers: a tie goes to the earlier text
            similarity = jaccard(shingles, shingles_of(self._kept[other][1]))
            if similarity >= self._threshold and similarity > best:
                found, best = self._kept[other][0], similarity
        if found is None:
            self._lsh.insert(len(self._kept), signature)
            self._kept.append((key, text))
        return found


def shingles_of(text: str) -> frozenset[str]:
    """Return the runs of ``SHINGLE`` characters of a text, case and white space aside; of a shorter one, itself."""
    plain = re.sub(r"\s+", " ", text.strip().lower())
    return frozenset(plain[i : i + SHINGLE] for i in range(max(1, len(plain) - SHINGLE + 1)))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Return the size of the intersection of two sets over that of their union."""
    common = len(one & other)
    return common / (len(one) + len(other) - common)


def bands_of(threshold: float) -> tuple[int, int]:
    """Return bands (two or more) and rows per band: the most rows that miss at most ``MISSED`` of the pairs."""
    rows = max(
        r
        for r in range(1, PERMUTATIONS // 2 + 1)
        if r == 1 or missed(threshold, PERMUTATIONS // r, r) <= MISSED
    )
    return PERMUTATIONS // rows, rows


def missed(similarity: float, bands: int, rows: int) -> float:
    """Return the probability that LSH does not propose a pair of this similarity."""
    return float((1 - similarity**rows) ** bands)
