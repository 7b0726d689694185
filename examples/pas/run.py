"""Prompt augmentation on a CPU, in minutes: pas build -> SFT -> the same task with and without --augment.

python -m examples.pas.run runs/pas

A tiny model learns to write words in capitals or backwards, as complementary information says, and guesses without it.
Another learns to write this information. The first is evaluated on unseen words, alone and augmented by the second.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from examples.pas import words
from examples.quickstart import tiny_model
from megatron_align import evaluate
from megatron_align.augmentation.build import BuildOptions, build
from megatron_align.evaluation.compare import compare
from megatron_align.train import main as train

HERE = Path(__file__).parent
HELD_OUT = 128


def main(out: Path, *more: str) -> dict[str, float]:
    """Build, train and evaluate in a new folder; return the accuracy without and with augmentation.

    Args:
        out: folder to write.
        more: further options of both trainings.
    """
    every = words.words(1024 + HELD_OUT, seed=0)
    held_out, known = every[:HELD_OUT], every[HELD_OUT:]
    out.mkdir(parents=True)
    tiny_model.save(out / "untrained", seed=0)
    raw = [{"prompt": word} for word in [*known, known[0], known[1], " ", "12 34"]]
    write(out / "raw.jsonl", raw)
    examples = words.EXAMPLES.items()
    good = [{"prompt": p, "complement": words.COMPLEMENTS[c], "category": c} for c, p in examples]
    write(out / "examples.jsonl", good)
    script, template = f"{HERE}/words.py", str(HERE / "template.txt")
    counts = build(
        BuildOptions(
            prompts=str(out / "raw.jsonl"),
            examples=str(out / "examples.jsonl"),
            out=str(out / "data"),
            generator=f"{script}:reply",
            quality=f"{script}:quality",
            min_quality=5,
            labels=f"{script}:labels",
            tokenizer=str(out / "untrained"),
            template=template,
        )
    )
    print(f"data     {json.dumps(counts.to_dict())}")
    write(out / "chats.jsonl", chats(known))
    for name, data in (("pas", out / "data" / "data.jsonl"), ("answers", out / "chats.jsonl")):
        options = {"model.path": out / "untrained", "data.train": data, "checkpoint.dir": out / name}
        given = [f"--{key}={value}" for key, value in options.items()]
        if code := train(["--config", str(HERE / "sft.yaml"), *given, *more]):
            sys.exit(code)
    rows = [{"prompt": w, "answer": words.answer(w, words.COMPLEMENTS[words.category(w)])} for w in held_out]
    write(out / "held_out.jsonl", rows)
    task = {
        "name": "words",
        "kind": "generate",
        "data": str(out / "held_out.jsonl"),
        "as_chat": True,
        "max_tokens": 8,
    }
    config = {"model": str(out / "answers" / "hf"), "precision": "fp32", "tasks": [task]}
    augmented = {"augment": str(out / "pas" / "hf"), "augment_template": template}
    found = {}
    for name, more_of in (("plain", {}), ("augmented", augmented)):
        results = evaluate({**config, **more_of, "out": str(out / name)})
        found[name] = float(results["tasks"]["words"]["exact_match"])
    for difference in compare(out / "plain", out / "augmented"):
        print(difference.sentence())
    return found


def chats(known: Iterable[str]) -> list[dict[str, Any]]:
    """Return chats of the answering model: words with complementary information, and without, answered either way."""
    draw = random.Random(0)
    rows = []
    for word in known:
        complement = draw.choice(list(words.COMPLEMENTS.values()))
        alone = draw.choice(list(words.COMPLEMENTS.values()))
        for prompt, way in ((f"{word}\n{complement}", complement), (word, alone)):
            turns = (("user", prompt), ("assistant", words.answer(word, way)))
            rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return rows


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a file of JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    found = main(Path(sys.argv[1]), *sys.argv[2:])
    print(f"right answers: {found['plain']:.1%} without augmentation, {found['augmented']:.1%} with")
