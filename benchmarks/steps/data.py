"""The model and the records of a comparison: drawn ones of given lengths, or real ones from a file."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.steps.task import MODELS, Task

ASSISTANT = "\n\nAssistant:"
Record = dict[str, Any]


def make(task: Task) -> None:
    """Write model, adapter and records into the task's folder."""
    from tests.harness.tiny import make_adapter, make_model

    sizes = MODELS[task.model]
    variant = "qwen2_reward" if task.objective == "reward" else "qwen2_tied"
    make_model(task.model_folder, variant, num_attention_heads=4, num_key_value_heads=2, **sizes)
    if task.adapter_folder:
        make_adapter(task.adapter_folder, task.model_folder, rank=task.rank, alpha=2.0 * task.rank, b=0.0)
    draw = random.Random(task.seed)
    count = task.steps * task.batch
    if task.data is None:
        records = [DRAWN[task.objective](task, draw) for _ in range(count)]
    else:
        real = real_records(Path(task.data), task.objective, task.longest)
        if len(real) < count:
            raise SystemExit(
                f"{task.data} has {len(real)} records of at most {task.longest} bytes, {count} are needed"
            )
        records = draw.sample(real, count)
    task.records.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def text_of(draw: random.Random, length: float) -> str:
    """Return a drawn text of 0.8 to 1.2 times this many bytes."""
    return "".join(draw.choices("abcdefghij klmnop", k=int(length * draw.uniform(0.8, 1.2)))) + "."


def drawn_pair(task: Task, draw: random.Random) -> Record:
    """Return a prompt with a chosen and a rejected answer."""
    prompt = text_of(draw, task.prompt * task.answer)
    return {"prompt": prompt, "chosen": text_of(draw, task.answer), "rejected": text_of(draw, task.answer)}


def drawn_chat(task: Task, draw: random.Random) -> Record:
    """Return a prompt with its answer."""
    return {"prompt": text_of(draw, task.prompt * task.answer), "completion": text_of(draw, task.answer)}


def drawn_labelled(task: Task, draw: random.Random) -> Record:
    """Return a prompt with an answer that is good or bad."""
    return {**drawn_chat(task, draw), "label": draw.random() < 0.5}


def drawn_group(task: Task, draw: random.Random) -> Record:
    """Return a prompt with scored completions."""
    completions = [
        {"content": text_of(draw, task.answer), "score": draw.uniform(-1, 1)} for _ in range(task.completions)
    ]
    return {"prompt": text_of(draw, task.prompt * task.answer), "completions": completions}


DRAWN: dict[str, Callable[[Task, random.Random], Record]] = {
    "dpo": drawn_pair,
    "reward": drawn_pair,
    "sft": drawn_chat,
    "kto": drawn_labelled,
    "grpo": drawn_group,
}


def real_records(file: Path, objective: str, longest: int) -> list[Record]:
    """Return the records of a JSON or JSON Lines file, as ``objective`` reads them, of at most ``longest`` bytes.

    Args:
        file: of ``dpo`` and ``reward`` pairs: prompt, chosen, rejected, or two transcripts as Anthropic's; of ``sft``
            prompt and completion, or Alpaca's instruction, input and output; of ``kto`` one of these two kinds: a pair
            becomes a good and a bad completion.
        objective: what is trained.
        longest: bytes of a prompt with either answer.
    """
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    text = data.decode()
    read = json.loads(text) if text.lstrip().startswith("[") else map(json.loads, text.splitlines())
    records = [
        split_transcripts(record) if "prompt" not in record and "chosen" in record else record
        for record in read
    ]
    if objective in ("dpo", "reward", "kto"):
        kept = [
            r for r in records if r["chosen"] != r["rejected"] and fits(r, ("chosen", "rejected"), longest)
        ]
        return [labelled for r in kept for labelled in both_labels(r)] if objective == "kto" else kept
    if objective == "sft":
        chats = [from_alpaca(record) if "instruction" in record else record for record in records]
        return [r for r in chats if fits(r, ("completion",), longest)]
    raise SystemExit(f"benchmarks.{objective} takes drawn data only, --data {file} is not read")


def fits(record: Record, answers: tuple[str, ...], longest: int) -> bool:
    """Return whether the prompt with each of these answers takes at most this many bytes."""
    return max(len((record["prompt"] + record[name]).encode()) for name in answers) <= longest


def split_transcripts(record: Record) -> Record:
    """Return prompt and answers of two transcripts that part in the assistant's last turn."""
    start = record["chosen"].rindex(ASSISTANT) + len(ASSISTANT)
    prompt, chosen = record["chosen"][:start], record["chosen"][start:]
    rejected = record["rejected"][record["rejected"].rindex(ASSISTANT) + len(ASSISTANT) :]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def both_labels(pair: Record) -> list[Record]:
    """Return a pair as a good and a bad completion."""
    return [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for name in ("chosen", "rejected")
    ]


def from_alpaca(record: Record) -> Record:
    """Return an Alpaca record as prompt and completion."""
    question = "\n".join(part for part in (record["instruction"], record.get("input")) if part)
    return {"prompt": question + "\n", "completion": record["output"]}
