"""Near duplicates among the answers to one prompt, by ROUGE-L: the longest common subsequence of words."""

from __future__ import annotations

import re
from collections.abc import Sequence


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case; each character of a script without spaces is a word."""
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+", text.lower())


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, bit-parallel over ``one`` (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << i
    every = (1 << len(one)) - 1
    row = every  # a zero bit for each word that the subsequence has gained
    for word in other:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & every
    return len(one) - row.bit_count()


def rouge_l(one: Sequence[str], other: Sequence[str]) -> float:
    """Return the F1 of ROUGE-L of two texts, given as words; two texts without words are equal."""
    if not one or not other:
        return float(len(one) == len(other))
    return 2 * common_subsequence(one, other) / (len(one) + len(other))


def distinct(texts: Sequence[str], threshold: float) -> list[int]:
    """Return the indices of the texts that are no near duplicate of an earlier one that is kept.

    Args:
        texts: in order of preference.
        threshold: ROUGE-L from which two texts are duplicates; equal texts always are.
    """
    kept: list[int] = []
    words = [words_of(text) for text in texts]
    for i, text in enumerate(texts):
        if not any(text == texts[k] or rouge_l(words[k], words[i]) >= threshold for k in kept):
            kept.append(i)
    return kept
