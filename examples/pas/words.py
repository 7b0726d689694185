"""The example's task: a word is written in capitals or backwards, and only complementary information says which.

The functions at the end stand in for the models of `pas build`: they write complements, criticise them, score and label
prompts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

VOWELS, CONSONANTS = "aeiou", "bdgklmnprst"
COMPLEMENTS = {"vowel": "Use capitals.", "consonant": "Write it backwards."}  # by category of the word
EXAMPLES = {"vowel": "olan", "consonant": "tipo"}


def words(count: int, seed: int) -> list[str]:
    """Return different words of four letters."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(draw.choice(VOWELS + CONSONANTS) for _ in range(4))] = None
    return list(found)


def category(word: str) -> str:
    """Return the category of a word: that of its first letter."""
    return "vowel" if word[0] in VOWELS else "consonant"


def answer(word: str, complement: str) -> str:
    """Return a word as complementary information requires it."""
    return word.upper() if complement == COMPLEMENTS["vowel"] else word[::-1]


def reply(task: str, prompt: str, complement: str = "", refused: Sequence[str] = ()) -> Any:
    """Reply as a model would; every tenth word or so is answered at first, which the critic finds."""
    right = COMPLEMENTS[category(prompt)]
    if task == "generate":
        return answer(prompt, right) if not refused and prompt.endswith("n") else right
    good = complement == right
    faults = [] if good else ["answering"]
    return {"Reason": "", "Faults": faults, "Is_correct": "Yes" if good else "No", "FinalAPE": ""}


def quality(prompts: Sequence[str]) -> list[float]:
    """Score prompts: words are good."""
    return [10.0 if prompt.isalpha() else 0.0 for prompt in prompts]


def labels(prompts: Sequence[str]) -> list[str]:
    """Label prompts."""
    return [category(prompt) for prompt in prompts]
