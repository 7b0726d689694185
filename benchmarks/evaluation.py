"""Evaluation on a CPU: ours against a loop over ``transformers``, and against lm-eval's own ``hf`` model, in one run.

``python -m benchmarks.evaluation`` builds a small random Qwen2. The loss of chats of mixed lengths is compared with a
plain loop, one conversation at a time and in padded batches of the file's order; multiple choice, four choices after a
context of eight times their length, with lm-eval (skipped where it is not installed). It checks that loss and accuracy
are equal, prints CPU seconds (one thread, loading and tokenisation included) and appends rows to
``benchmarks/results/evaluation.csv``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from benchmarks.generation import SIZES
from benchmarks.rows import record, stamp
from examples.quickstart.tiny_model import build_tokenizer
from megatron_align.evaluation.run import evaluate

LETTERS = "abcdefghijklmnopqrstuvwxyz     "
CHOICE, CHOICES = 32, 4  # characters, which are tokens
TASK = """task: shared_contexts
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
"""


def text_of(draw: random.Random, length: int) -> str:
    """Return a text of random letters that neither begins nor ends with a space."""
    return "x" + "".join(draw.choices(LETTERS, k=max(0, length - 2))) + "x"


def write_model(folder: Path) -> None:
    """Save the model and its tokenizer of bytes."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(words=())
    tokenizer.save_pretrained(folder)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, eos_token_id=tokenizer.eos_token_id, dtype="float32"))
    model.save_pretrained(folder)


def write_chats(file: Path, count: int) -> None:
    """Write conversations whose answers have 10 to about 1500 characters, lognormal."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        for _ in range(count):
            length = min(1500, int(10 + 90 * draw.lognormvariate(0, 1)))
            turns = [
                {"role": "user", "content": text_of(draw, 40)},
                {"role": "assistant", "content": text_of(draw, length)},
            ]
            out.write(json.dumps({"messages": turns}) + "\n")


def write_questions(file: Path, count: int) -> None:
    """Write questions with a context of eight times their choices' length."""
    draw = random.Random(1)
    with file.open("w", encoding="utf-8") as out:
        for _ in range(count):
            choices = [text_of(draw, CHOICE) for _ in range(CHOICES)]
            question = {"question": text_of(draw, 8 * CHOICE), "choices": choices}
            out.write(json.dumps({**question, "answer": draw.randrange(CHOICES)}) + "\n")


def loop(folder: Path, chats: Path, batch: int) -> float:
    """Return the mean loss over the answers' tokens: batches of the file's order, padded on the right."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval(),
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
    )
    records = [json.loads(line)["messages"] for line in chats.read_text(encoding="utf-8").splitlines()]
    total, count = 0.0, 0
    for start in range(0, len(records), batch):
        some = records[start : start + batch]
        full = [tokenizer.apply_chat_template(turns, return_dict=False) for turns in some]
        begins = [
            len(tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False))
            for turns in some
        ]
        longest = max(map(len, full))
        ids = torch.zeros(len(some), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for row, (tokens, begin) in enumerate(zip(full, begins, strict=True)):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, begin : len(tokens)] = ids[row, begin : len(tokens)]
            mask[row, : len(tokens)] = 1
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum"
        )
        total, count = total + losses.item(), count + int((labels[:, 1:] >= 0).sum())
    return total / count


def harness(folder: Path, questions: Path, batch: int) -> float:
    """Return the accuracy that lm-eval's ``hf`` model finds."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task = questions.with_suffix(".yaml")
    task.write_text(TASK.format(data=questions, cache=questions.parent / "cache"), encoding="utf-8")
    lm = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=batch, max_length=4096)
    manager = TaskManager(include_defaults=False)
    found = simple_evaluate(model=lm, tasks=[str(task)], task_manager=manager, bootstrap_iters=0)
    return float(found["results"]["shared_contexts"]["acc,none"])


def ours(folder: Path, out: Path, task: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of a task in our results."""
    config = {"model": str(folder), "out": str(out), "precision": "fp32", "tasks": [{"name": "task", **task}]}
    entry: dict[str, Any] = evaluate(config)["tasks"]["task"]
    return entry


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of a call and its CPU seconds."""
    began = time.process_time()
    return call(), time.process_time() - began


def row(measure: str, items: int, name: str, value: float, seconds: tuple[float, float]) -> dict[str, object]:
    """Return a row; ``seconds``: of this, and of ours."""
    return {
        **stamp(),
        "load": f"{os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "measure": measure,
        "by": name,
        "items": items,
        "value": f"{value:.6f}",
        "cpu_seconds": f"{seconds[0]:.2f}",
        "ours_is_faster_by": f"{seconds[0] / seconds[1]:.2f}",
    }


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chats", type=int, default=192)
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="of the peers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="megatron_align_evaluation_") as name:
        folder, chats, questions = (
            Path(name) / "model",
            Path(name) / "chats.jsonl",
            Path(name) / "questions.jsonl",
        )
        write_model(folder)
        write_chats(chats, options.chats)
        write_questions(questions, options.questions)
        entry, own = timed(lambda: ours(folder, Path(name) / "loss", {"kind": "loss", "data": str(chats)}))
        rows = [row("loss", options.chats, "ours", entry["loss"], (own, own))]
        for batch in options.batch:
            value, seconds = timed(lambda batch=batch: loop(folder, chats, batch))
            assert abs(value / entry["loss"] - 1) < 1e-5, f"{value} is not {entry['loss']}"
            rows.append(
                row("loss", options.chats, f"transformers, batches of {batch}", value, (seconds, own))
            )
        if importlib.util.find_spec("lm_eval") is None:
            print(
                "lm_eval is not installed: multiple choice is not compared (pip install 'megatron-align[eval]')"
            )
        else:
            task = {"kind": "choice", "data": str(questions)}
            entry, own = timed(lambda: ours(folder, Path(name) / "choice", task))
            rows.append(row("choice", options.questions, "ours", entry["accuracy"], (own, own)))
            for batch in options.batch:
                value, seconds = timed(lambda batch=batch: harness(folder, questions, batch))
                assert value == entry["accuracy"], f"{value} is not {entry['accuracy']}"
                by = f"lm-eval's hf, batches of {batch}"
                rows.append(row("choice", options.questions, by, value, (seconds, own)))
    record("evaluation", rows)


if __name__ == "__main__":
    main()
