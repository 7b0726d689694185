"""The quickstart's task: sums of two numbers below 100, as chats and as pairs, with sums the model never sees.

A question and its mirror (27+45 and 45+27) are always in the same split, so that a held-out sum cannot be
copied from training. Everything here is a pure function of the seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

LIMIT = 100  # addends are below this: 5050 unordered pairs, 10,000 questions
HELD_OUT_PAIRS = 256


@dataclass(frozen=True, slots=True, order=True)
class Sum:
    """One question and its right answer."""

    left: int
    right: int

    @property
    def question(self) -> str:
        """The user's question, for example ``27+45=``."""
        return f"{self.left}+{self.right}="

    @property
    def answer(self) -> str:
        """The right answer, for example ``72``."""
        return str(self.left + self.right)

    @property
    def mistake(self) -> str:
        """A typical wrong answer: off by one or two, or by a forgotten or superfluous carry."""
        slip = random.Random(f"{self.left} {self.right}").choice((-10, -2, -1, 1, 2, 10))
        wrong = self.left + self.right + slip
        return str(wrong if wrong >= 0 else -wrong + 1)


@dataclass(frozen=True, slots=True)
class Splits:
    """Training and held-out sums; no sum or mirrored sum is in both."""

    train: tuple[Sum, ...]
    held_out: tuple[Sum, ...]


def make_splits(seed: int, held_out_pairs: int = HELD_OUT_PAIRS) -> Splits:
    """Draw the held-out pairs without replacement; all the others are for training."""
    pairs = [(left, right) for left in range(LIMIT) for right in range(left, LIMIT)]
    random.Random(seed).shuffle(pairs)
    return Splits(_both_ways(pairs[held_out_pairs:]), _both_ways(pairs[:held_out_pairs]))


def write_chats(path: Path, sums: Iterable[Sum]) -> None:
    """Write one conversation per line: the user's question and the assistant's right answer."""
    with path.open("w", encoding="utf-8") as file:
        for one in sums:
            turns = (("user", one.question), ("assistant", one.answer))
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")


def write_pairs(path: Path, sums: Iterable[Sum]) -> None:
    """Write one preference pair per line: the right answer chosen, the mistake rejected."""
    with path.open("w", encoding="utf-8") as file:
        for one in sums:
            said = {"prompt": ("user", one.question), "chosen": ("assistant", one.answer)}
            said["rejected"] = ("assistant", one.mistake)
            record = {name: [{"role": role, "content": content}] for name, (role, content) in said.items()}
            file.write(json.dumps(record) + "\n")


def write_prompts(path: Path, sums: Iterable[Sum]) -> None:
    """Write one question per line with its right answer, by which rewards know what is right."""
    with path.open("w", encoding="utf-8") as file:
        for one in sums:
            prompt = [{"role": "user", "content": one.question}]
            file.write(json.dumps({"prompt": prompt, "answer": one.answer}) + "\n")


def _both_ways(pairs: list[tuple[int, int]]) -> tuple[Sum, ...]:
    return tuple(sorted({Sum(a, b) for left, right in pairs for a, b in ((left, right), (right, left))}))
