"""Write the data of the comparisons, from a finished recipe's: the same questions as its GRPO's, as pairs and labels.

    python -m examples.baichuan_alignment.compare_data --recipe runs/baichuan_alignment --out runs/compare/data

Also a few pairs of every field for reward models that can overfit, and an evaluation on these and on held-out ones.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from examples.baichuan_alignment.questions import FIELDS
from megatron_align.errors import InputError

FEW, TASKS = "few_pairs.jsonl", "preferences.yaml"
PAIRS = 1024  # of FEW, about as many of each field
TRAINED = "trained_"  # of a task's name: on pairs of FEW; without it on held-out ones
SCORED = 128  # trained pairs of each field that are evaluated: as many as are held out


def write(recipe: Path, out: Path) -> None:
    """Write everything; complete or absent.

    Raises:
        InputError: prompts and pairs of the recipe are not of the same questions, in the same order.
    """
    prompts, pairs = (_read(recipe / "data" / f"{name}.jsonl") for name in ("prompts", "pairs"))
    of_fields: dict[str, list[dict[str, Any]]] = {field: [] for field in FIELDS}
    for i, (prompt, pair) in enumerate(zip(prompts, pairs, strict=True), 1):
        if prompt["answer"] != pair["chosen"][0]["content"]:
            raise InputError(
                f"line {i} of {recipe / 'data'}/prompts.jsonl and pairs.jsonl must be one question"
            )
        of_fields[prompt["field"]].append(pair)
    partial = out.with_name(f".{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)  # of an earlier, killed start
    few = []
    tasks = [_task(field, recipe / "data" / "preferences" / f"{field}.jsonl") for field in FIELDS]
    for field, found in of_fields.items():
        _write(partial / "dpo" / f"{field}.jsonl", found)
        _write(partial / "kto" / f"{field}.jsonl", [row for pair in found for row in _labelled(pair)])
        own = found[: PAIRS // len(FIELDS) + (field in FIELDS[: PAIRS % len(FIELDS)])]
        few += own
        _write(partial / "trained" / f"{field}.jsonl", own[:SCORED])
        tasks.append(_task(f"{TRAINED}{field}", out / "trained" / f"{field}.jsonl"))
    _write(partial / FEW, few)
    config = {"precision": "fp32", "tasks": tasks}
    (partial / TASKS).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, out)


def mixture(recipe: Path, data: Path, kind: str) -> str:
    """Return the sources of DPO's or KTO's data as JSON: each field as often as in the prompts of the recipe's GRPO.

    Args:
        recipe: its folder.
        data: that of :func:`write`.
        kind: dpo or kto.
    """
    shares = json.loads((recipe / "mix_prompts" / "mixture.json").read_text(encoding="utf-8"))
    sources = [{**one, "path": str(data / kind / Path(one["path"]).name)} for one in shares]
    return json.dumps(sources)


def _task(name: str, file: Path) -> dict[str, str]:
    return {"name": name, "kind": "preference", "data": str(file)}


def _labelled(pair: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a pair's answers as a desirable and an undesirable one."""
    return [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for name in ("chosen", "rejected")
    ]


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run with command-line arguments; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.baichuan_alignment.compare_data")
    parser.add_argument("--recipe", type=Path, required=True, help="folder of a finished recipe")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args(arguments)
    try:
        write(options.recipe, options.out)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
