"""What the comparisons with TRL count is what each computes, and losses that differ are no comparison."""

import json
import random

import pytest

from benchmarks.steps import run
from benchmarks.steps.counts import Tokens, parts, tokens_of
from benchmarks.steps.data import DRAWN, make, real_records
from benchmarks.steps.task import MODELS, Task

PAIRS = [
    {"prompt": "p" * 10, "chosen": "c" * 4, "rejected": "r" * 2},
    {"prompt": "p" * 6, "chosen": "c" * 8, "rejected": "r" * 3},
]


def test_tokens_of_pairs():
    # sequences of 15, 13, 15 and 10 tokens with their end tokens; 5 + 3 + 9 + 4 of them are scored
    assert tokens_of(Task("dpo"), PAIRS) == Tokens(padded=60, plain=53, shared=37, scored=21)
    assert tokens_of(Task("reward"), PAIRS).scored == 4


def test_tokens_of_groups_are_padded_apart():
    groups = [
        {"prompt": "p" * 10, "completions": [{"content": "a"}, {"content": "abc"}]},
        {"prompt": "p", "completions": [{"content": "ab"}]},
    ]
    assert tokens_of(Task("grpo"), groups) == Tokens(padded=(10 + 4) * 3, plain=30, shared=20, scored=9)


def test_the_factors_multiply_to_the_ratio():
    task = Task("dpo")
    factors = parts(task, PAIRS)
    assert factors["reference"] == pytest.approx(4 / 3)
    assert factors["by_arithmetic"] == pytest.approx(
        factors["reference"] * factors["padding"] * factors["sharing"]
    )
    assert parts(Task("sft"), [DRAWN["sft"](task, random.Random(0))])["by_arithmetic"] == pytest.approx(1)


@pytest.mark.parametrize("objective", DRAWN)
def test_drawn_records_are_those_of_the_task(objective, tmp_path, monkeypatch):
    monkeypatch.setitem(
        MODELS,
        "honest",
        {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    )
    task = Task(objective, folder=str(tmp_path), batch=2, steps=3, answer=20, prompt=2)
    make(task)
    records = task.read_records()
    assert len(records) == 6
    assert all(30 < len(record["prompt"]) < 50 for record in records)
    task.write(tmp_path / "task.json")
    assert Task.read(tmp_path / "task.json") == task


def test_real_records(tmp_path):
    talk = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant:"
    (tmp_path / "hh.jsonl").write_text(json.dumps({"chosen": talk + " Bye.", "rejected": talk + " No."}))
    assert real_records(tmp_path / "hh.jsonl", "dpo", 100) == [
        {"prompt": talk, "chosen": " Bye.", "rejected": " No."}
    ]
    assert not real_records(tmp_path / "hh.jsonl", "dpo", 20)
    assert [r["label"] for r in real_records(tmp_path / "hh.jsonl", "kto", 100)] == [True, False]
    (tmp_path / "alpaca.json").write_text(
        json.dumps([{"instruction": "Add.", "input": "1 2", "output": "3"}])
    )
    assert real_records(tmp_path / "alpaca.json", "sft", 100) == [
        {"prompt": "Add.\n1 2\n", "completion": "3"}
    ]


def test_losses_and_norms_that_differ_are_refused(tmp_path, monkeypatch):
    one = {
        "losses": [0.5, 1e-9],
        "grad_norms": [2.0, 2.0],
        "seconds": [1.0, 1.0],
        "operations": 2,
        "peak_mb": 3,
    }
    one |= {"before": 0.0, "base_gradient_bytes": 0, "base_optimizer_bytes": 0}
    task = Task("dpo", batch=2, steps=1, micro_batch=2, folder=str(tmp_path))
    task.records.write_text("\n".join(map(json.dumps, PAIRS)))
    kept = []
    monkeypatch.setattr(run, "append", lambda name, rows: kept.extend(rows))
    with pytest.raises(SystemExit, match="gradient norms of trl differ from ours by 1.0e-03"):
        run.require_equal({"ours": one, "trl": {**one, "grad_norms": [2.0, 2.002]}}, "trl")
    equal = {"ours": one, "trl": {**one, "losses": [0.5, -1e-9], "seconds": [9.0, 2.0]}}
    run.require_equal(equal, "trl")
    run.report(task, equal, 2)
    assert [row["times_ours"] for row in kept] == [1.0, 2.0]
