"""Checks of answers: what is extracted, what counts as equal, and mathematics that never ends."""

import threading
import time
from dataclasses import replace

import pytest

from megatron_align.errors import InputError
from megatron_align.rollout.prompts import PromptRecord
from megatron_align.rollout.verifiers import running as running_checks
from megatron_align.rollout.verifiers.checks import CHECKS, expected_answers, extracted
from tests.harness import training_ranks


@pytest.mark.parametrize(
    ("answer", "extract", "part"),
    [
        ("it is 4", None, "it is 4"),
        ("#### 3\n#### 4", r"#### (\S+)", "4"),
        ("3 or 4", r"\d", "4"),
        ("none", r"\d", ""),
        ("a", "(b)?", ""),
    ],
)
def test_the_last_match_is_judged(answer, extract, part):
    assert extracted(answer, extract) == part


def record(answer=None, **raw):
    """Return a record; ``answer``: its last assistant turn."""
    return PromptRecord(raw=raw, where="x.jsonl:1", prompt="q", answer=answer)


def test_accepted_answers():
    assert expected_answers(PromptRecord(raw={"answer": 4}, where="w", prompt="q")) == ("4",)
    assert expected_answers(record(target=["a", "b"])) == ("a", "b")
    assert expected_answers(record("the turn")) == ("the turn",)
    for bad in ({}, {"target": None}, {"target": []}, {"target": [True]}, {"reference": {"x": 1}}):
        with pytest.raises(InputError, match="x.jsonl:1: field '(answer|target|reference)' must be text"):
            expected_answers(record(**bad))


def test_texts():
    assert CHECKS["exact_match"].judge(" 4\n", ("5", "4")) == {"exact_match": 1.0}
    assert CHECKS["exact_match"].judge("it is 4", ("4",)) == {"exact_match": 0.0}
    assert CHECKS["contains"].judge("it is\n 4", ("is 4",)) == {"contains": 1.0}


def test_mathematics_is_compared_and_what_never_ends_is_no_answer(monkeypatch):
    monkeypatch.setattr(
        running_checks, "CHECK_SECONDS", 2.0
    )  # an answer takes milliseconds, imports are not counted
    pairs = [
        ("The answer is \\boxed{1/2}", ("0.5",)),
        ("so $x = \\frac{3}{4}$", ("\\frac{6}{8}",)),
        ("it is 7", ("8",)),
        ("\\boxed{9^9^9^9^9^9^9^9^9}", ("3",)),
        ("2,000", ("2000",)),  # after the process was replaced
    ]
    with running_checks.checking("math") as scoring:
        assert [score["math"] for score in scoring(pairs)] == [1, 1, 0, 0, 1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_of_a_machine_share_its_cores(pool, ranks):
    """Each of 8 ranks that ran a program per core would run 8 programs on every core, and none in time."""
    for share, cores in pool.run(ranks, training_ranks.cores_of_each):
        assert share == max(1, cores // ranks)


def test_no_more_programs_run_than_the_share(monkeypatch):
    running, most, lock = 0, 0, threading.Lock()

    def judge(answer, expected):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return {"pass_rate": 1.0}

    monkeypatch.setitem(CHECKS, "code", replace(CHECKS["code"], judge=judge))
    with running_checks.checking("code", None, 3) as scoring:
        assert len(scoring([("", "")] * 12)) == 12
    assert most == 3
