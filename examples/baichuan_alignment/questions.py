"""Write the recipe's questions: sums, sorting, strings, format instructions, and formats that a prompt leaves open.

    python -m examples.baichuan_alignment.questions --out runs/baichuan_alignment/data

Everything is a pure function of the seed. No held-out question is trained on: neither its sum in any order, nor its
digits in any order, nor its word in any field.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

from examples.baichuan_alignment import scripted
from examples.pas import words
from examples.quickstart import task, tiny_model

FIELDS = ("sums", "sorting", "strings", "format", "open")
GROUPS = {"numbers": ("sums", "sorting"), "text": ("strings",), "instructions": ("format", "open")}
TEMPLATE = Path(__file__).parents[1] / "pas" / "template.txt"
PIECES = (
    "Sort ",
    "Reverse ",
    "Capitals ",
    "Double ",
    "Brackets ",
    "Dashes ",
    "Write ",
)  # one token each, as are the template's
HELD_OUT_WORDS, TRAINED_WORDS = 400, 2600
MAX_TOKENS = 12  # of an answer
RAW = {"sums": 250, "sorting": 250, "strings": 250, "format": 250, "open": 1200}  # raw prompts of `pas build`
SAMPLED = 1500  # prompts that the merged model answers for preference data
_DIGITS = 5


@dataclass(frozen=True, slots=True)
class Question:
    """A question of one field, its right answer and a typical wrong one."""

    field: str
    prompt: str
    answer: str
    mistake: str
    complement: str = scripted.COMPLEMENTS["plain"]  # what prompt augmentation appends

    @property
    def augmented(self) -> str:
        """The prompt with its complement, as `evaluate --augment` makes it."""
        return f"{self.prompt}\n{self.complement}"

    @property
    def clear(self) -> str:
        """A prompt that has one right answer: augmented where the prompt alone leaves the format open."""
        return self.augmented if self.field == "open" else self.prompt


@dataclass(frozen=True, slots=True)
class Questions:
    """Questions to train on and held-out ones, by field."""

    train: dict[str, list[Question]]
    held_out: dict[str, list[Question]]


def make(seed: int, held_out: int, scale: float = 1.0) -> Questions:
    """Draw all questions.

    Args:
        seed: of the generators.
        held_out: questions of each field that are never trained on.
        scale: share of the questions to train on that is kept.
    """
    every = words.words(HELD_OUT_WORDS + TRAINED_WORDS, seed)
    parts = (every[:HELD_OUT_WORDS], every[HELD_OUT_WORDS:])
    splits = task.make_splits(seed)
    sums = (splits.held_out, splits.train)
    sets = list(combinations_with_replacement("0123456789", _DIGITS))
    random.Random(seed).shuffle(sets)
    digits = (sets[: len(sets) // 5], sets[len(sets) // 5 :])
    found: list[dict[str, list[Question]]] = []
    for name, of_sums, of_digits, of_words in zip(("held out", "trained"), sums, digits, parts, strict=True):
        draw = random.Random(f"{seed} {name}")
        kinds = {
            "sums": [Question("sums", s.question, s.answer, s.mistake) for s in of_sums],
            "sorting": [_sorting(each, draw) for each in of_digits for _ in range(2)],
            "strings": [q for word in of_words for q in _strings(word, draw)],
            "format": [q for word in of_words for q in _formats(word, draw)],
            "open": [_open(word, draw if name == "trained" else None) for word in of_words],
        }
        for questions in kinds.values():
            draw.shuffle(questions)
        found.append(kinds)
    held, train = found
    return Questions(
        {field: train[field][: max(16, round(scale * len(train[field])))] for field in FIELDS},
        {field: held[field][:held_out] for field in FIELDS},
    )


def _sorting(digits: Sequence[str], draw: random.Random) -> Question:
    answer = "".join(sorted(digits))
    shuffled = "".join(draw.sample(list(digits), len(digits)))
    steps = [i for i in range(len(answer) - 1) if answer[i] != answer[i + 1]]
    i = draw.choice(steps) if steps else 0
    mistake = answer[:i] + answer[i + 1] + answer[i] + answer[i + 2 :] if steps else answer[:-1]
    return Question("sorting", f"Sort {shuffled}", answer, mistake)


def _strings(word: str, draw: random.Random) -> list[Question]:
    turned, capitals, doubled = word[::-1], word.upper(), "".join(2 * letter for letter in word)
    swapped = turned[1] + turned[0] + turned[2:]
    i = draw.randrange(len(word))
    return [
        Question("strings", f"Reverse {word}", turned, swapped if swapped != turned else turned[:-1]),
        Question("strings", f"Capitals {word}", capitals, capitals[:i] + word[i] + capitals[i + 1 :]),
        Question("strings", f"Double {word}", doubled, doubled[: 2 * i + 1] + doubled[2 * i + 2 :]),
    ]


def _formats(word: str, draw: random.Random) -> list[Question]:
    brackets, dashes = scripted.FORMATS["brackets"](word), scripted.FORMATS["dashes"](word)
    broken = draw.choice((f"[{word}", f"{word}]", dashes))
    return [
        Question("format", f"Brackets {word}", brackets, broken),
        Question("format", f"Dashes {word}", dashes, dashes.replace("-", "", 1)),
    ]


def _open(word: str, draw: random.Random | None) -> Question:
    """Return a question whose complement decides: in training either format, so that the word says nothing of it."""
    way = scripted.way(f"Write {word}") if draw is None else draw.choice(("brackets", "dashes"))
    other = "dashes" if way == "brackets" else "brackets"
    answer, mistake = scripted.FORMATS[way](word), scripted.FORMATS[other](word)
    return Question("open", f"Write {word}", answer, mistake, scripted.COMPLEMENTS[way])


def chats(questions: Questions, seed: int) -> list[dict[str, Any]]:
    """Return the chats of supervised fine-tuning, with their field and group: a third of the prompts are augmented.

    A prompt that leaves the format open is answered in either format.
    """
    draw = random.Random(seed)
    rows = []
    for group, fields in GROUPS.items():
        for question in (q for field in fields for q in questions.train[field]):
            share = 0.6 if question.field == "open" else 0.3
            prompt = question.augmented if draw.random() < share else question.prompt
            turns = (("user", prompt), ("assistant", question.answer))
            messages = [{"role": role, "content": content} for role, content in turns]
            rows.append({"messages": messages, "field": question.field, "group": group})
    draw.shuffle(rows)
    return rows


def pairs(questions: Iterable[Question]) -> list[dict[str, Any]]:
    """Return preference pairs with absolute scores: the right answer over a typical mistake."""
    return [
        {
            "prompt": [{"role": "user", "content": q.clear}],
            "chosen": [{"role": "assistant", "content": q.answer}],
            "rejected": [{"role": "assistant", "content": q.mistake}],
            "chosen_score": 1.0,
            "rejected_score": 0.0,
        }
        for q in questions
    ]


def prompts(questions: Iterable[Question], augmented: float = 0.0) -> list[dict[str, Any]]:
    """Return prompts for sampling and rollouts, with what is right; ``augmented``: that share has its complement."""
    draw = random.Random(0)
    return [
        {
            "prompt": [{"role": "user", "content": q.augmented if draw.random() < augmented else q.clear}],
            "answer": q.answer,
            "field": q.field,
        }
        for q in questions
    ]


def tasks(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the evaluations' tasks by configuration: answers, complements, preferences."""
    answer = {"kind": "generate", "as_chat": True, "max_tokens": MAX_TOKENS}
    return {
        "answers": [{"name": f, "data": str(folder / "held_out" / f"{f}.jsonl"), **answer} for f in FIELDS],
        "complements": [
            {"name": f, "data": str(folder / "complements" / f"{f}.jsonl"), **answer, "max_tokens": 24}
            for f in FIELDS
        ],
        "preferences": [
            {"name": f, "kind": "preference", "data": str(folder / "preferences" / f"{f}.jsonl")}
            for f in FIELDS
        ],
    }


def write(out: Path, seed: int, held_out: int, scale: float) -> None:
    """Write all data, the evaluations' configurations and the untrained model; complete or absent."""
    partial = out.with_name(f".{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)  # of an earlier, killed start
    questions = make(seed, held_out, scale)
    template = TEMPLATE.read_text(encoding="utf-8").strip()
    every = [q for field in FIELDS for q in questions.train[field]]
    random.Random(seed).shuffle(every)
    raw = [
        {"prompt": q.prompt}
        for field in FIELDS
        for q in questions.train[field][: max(16, round(RAW[field] * scale))]
    ]
    files = {
        "chats": chats(questions, seed),
        "prompts": prompts(every, augmented=0.5),
        "sample_prompts": prompts(every[: max(16, round(SAMPLED * scale))]),
        "pairs": pairs(every),
        "raw": [*raw, raw[0], raw[1], {"prompt": " "}, {"prompt": "12 34"}],
        "examples": scripted.examples(),
    }
    for field, held in questions.held_out.items():
        files[f"held_out/{field}"] = [{"prompt": q.prompt, "answer": q.answer} for q in held]
        files[f"preferences/{field}"] = pairs(held)
        files[f"complements/{field}"] = [
            {"prompt": template.replace("{prompt}", q.prompt), "answer": q.complement} for q in held
        ]
    for name, rows in files.items():
        file = partial / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, entries in tasks(out).items():
        config = {"precision": "fp32", "tasks": entries}
        (partial / f"{name}.yaml").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    labels = [line.partition(":")[0] + ":" for line in template.splitlines()]
    tiny_model.save(partial / "untrained", seed, (*tiny_model.ROLES, *PIECES, *labels))
    os.replace(partial, out)


def main(arguments: list[str] | None = None) -> int:
    """Run with command-line arguments; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.baichuan_alignment.questions")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and of the untrained model")
    parser.add_argument("--held-out", type=int, default=128, help="held-out questions of each field")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the questions to train on")
    options = parser.parse_args(arguments)
    write(options.out, options.seed, options.held_out, options.scale)
    return 0


if __name__ == "__main__":
    sys.exit(main())
