"""Stand-ins for the models of `pas build`: they write complements, criticise them, score and label prompts.

They read a prompt alone, as a model would. What a prompt leaves open is the format of "Write WORD": this product wants
words that begin with a vowel in brackets, all others with dashes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

VOWELS = "aeiou"
FORMATS: dict[str, Callable[[str], str]] = {"brackets": lambda word: f"[{word}]", "dashes": "-".join}
COMPLEMENTS = {"brackets": "Use brackets.", "dashes": "Use dashes.", "plain": "Answer only."}


def way(prompt: str) -> str:
    """Return the format that this product wants; plain: the prompt says all."""
    first, _, word = prompt.partition(" ")
    if first != "Write" or not word:
        return "plain"
    return "brackets" if word[0] in VOWELS else "dashes"


def complement(prompt: str) -> str:
    """Return the complementary information that a prompt needs."""
    return COMPLEMENTS[way(prompt)]


def examples() -> list[dict[str, str]]:
    """Return a good pair of each category."""
    prompts = ("Write olan", "Write tipo", "Sort 5291", "27+45=", "Reverse olan", "Dashes olan")
    return [{"prompt": p, "complement": complement(p), "category": way(p)} for p in prompts]


def reply(task: str, prompt: str, complement: str = "", refused: Sequence[str] = ()) -> Any:
    """Reply as a model would; some prompts are answered at first, which the critic finds."""
    right = COMPLEMENTS[way(prompt)]
    if task == "generate":
        return prompt.upper() if not refused and prompt.endswith("n") else right
    good = complement == right
    faults = [] if good else ["answering"]
    return {"Reason": "", "Faults": faults, "Is_correct": "Yes" if good else "No", "FinalAPE": ""}


def quality(prompts: Sequence[str]) -> list[float]:
    """Score prompts: those that ask for something are good."""
    return [10.0 if prompt.endswith("=") or prompt[0].isupper() else 0.0 for prompt in prompts]


def labels(prompts: Sequence[str]) -> list[str]:
    """Label prompts with their category."""
    return [way(prompt) for prompt in prompts]
