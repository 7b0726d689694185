"""Compare answers with a baseline's by a judging model: both orders, ties, a win rate that lengths do not sway.

A comparison is two requests, one for each order of the two answers. If both prefer the same answer it wins; otherwise,
or if the judge says so, they tie. Raw replies are kept, so that a killed or repeated evaluation asks nothing twice.

Shapes: N comparisons.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_align.data.formats.fields import bad_field
from megatron_align.data.formats.files import read_fields
from megatron_align.errors import InputError, require
from megatron_align.evaluation.config import JudgeTask
from megatron_align.rollout.endpoint import (
    Endpoint,
    FailureBudget,
    RequestFailed,
    chat_reply,
    concurrently,
)
from megatron_align.rollout.kept_replies import KeptReplies, content_key
from megatron_align.rollout.prompts import PromptRecord
from megatron_align.rollout.verifiers.checks import Scores, expected_answers

METRICS = ("win_rate", "wins", "ties", "losses", "unjudged")
Verdict = Literal["A", "B", "C"]
_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_INSTRUCTIONS = """\
Compare two answers to the same conversation. Judge how correct, helpful, complete and clear each is, and \
whether it does what was requested. Neither the order in which they are shown nor their length counts in favour \
of one. First explain your comparison in a few sentences. Then end with exactly one of these verdicts on a line \
of its own: [[A]] if answer A is better, [[B]] if answer B is better, [[C]] if they are equally good."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The conversation of a prompt as text, and the answer of the baseline."""

    conversation: str
    baseline: str


def read_comparison(record: PromptRecord, baseline: str | None) -> Comparison:
    """Return what a record's answer is compared with.

    Args:
        record: with the prompt.
        baseline: the answer; None: the record's own.

    Raises:
        InputError: there is no answer to compare with.
    """
    if isinstance(record.prompt, str):
        conversation = record.prompt
    else:
        conversation = "\n\n".join(f"{message.role}: {message.content}" for message in record.prompt)
    return Comparison(conversation, expected_answers(record)[0] if baseline is None else baseline)


def read_baselines(file: str) -> list[str]:
    """Return the first completion of each row of a file that ``generate`` wrote.

    Raises:
        InputError: a row has none; names file and line.
    """
    answers = []
    for where, raw in read_fields(file):
        if isinstance(raw, InputError):
            raise raw
        try:
            answers.append(str(raw["completions"][0]["content"]))
        except (LookupError, TypeError) as error:
            raise bad_field(
                where, "completions", "a list with a completion", raw.get("completions")
            ) from error
    return answers


class Judge:
    """Asks an endpoint for verdicts; use it as a context manager.

    Args:
        task: its url, judge, judge_tokens, tries, workers and failures are read.
        folder: of the raw replies; those of earlier evaluations are used.
        rank: this process, which writes a file of its own.
    """

    def __init__(self, task: JudgeTask, folder: Path, rank: int) -> None:
        self._task, self._endpoint = task, Endpoint(task.url)
        self._budget = FailureBudget(task.failures)
        folder.mkdir(parents=True, exist_ok=True)
        earlier = folder.glob(f"{task.name}.judge.*.jsonl")
        self._kept = KeptReplies(folder / f"{task.name}.judge.{rank}.jsonl", earlier)

    def scores(self, answers: Sequence[tuple[str, Comparison]]) -> list[Scores]:
        """Return the scores of answers, each with what it is compared with.

        Raises:
            InputError: more requests fail than the task allows.
        """
        return list(concurrently(self._score, answers, self._task.workers))

    def _score(self, item: tuple[str, Comparison]) -> Scores:
        answer, comparison = item
        orders = ((answer, comparison.baseline), (comparison.baseline, answer))
        first, second = (self._verdict(comparison.conversation, order) for order in orders)
        unjudged = first is None or second is None
        won, lost = first == "A" and second == "B", first == "B" and second == "A"
        return {
            "win_rate": 1.0 if won else 0.0 if lost else 0.5,
            "wins": float(won),
            "ties": float(not won and not lost),
            "losses": float(lost),
            "unjudged": float(unjudged),
            "length_difference": float(len(answer) - len(comparison.baseline)),
        }

    def _verdict(self, conversation: str, answers: tuple[str, str]) -> Verdict | None:
        """Return the verdict on two answers in this order; None: the judge gave none."""
        one, other = answers
        shown = f"# Conversation\n\n{conversation}\n\n# Answer A\n\n{one}\n\n# Answer B\n\n{other}"
        messages = [{"role": "system", "content": _INSTRUCTIONS}, {"role": "user", "content": shown}]
        key = content_key(self._task.url, self._task.judge, self._task.judge_tokens, messages)
        replies = self._kept.earlier(key)
        for attempt in range(self._task.tries):
            if attempt < len(replies):
                reply: str | None = replies[attempt]
            else:
                # Greedy first; a reply without a verdict would come again, so the next ones are drawn.
                reply = self._ask(messages, key, temperature=0.0 if attempt == 0 else 0.7)
            if reply is None:
                return None
            if verdicts := _VERDICT.findall(reply):
                return verdicts[-1]
        return None

    def _ask(self, messages: list[dict[str, str]], key: str, temperature: float) -> str | None:
        """Return the judge's reply, kept in the file; None: the request failed."""
        body = {
            "model": self._task.judge,
            "messages": messages,
            "max_tokens": self._task.judge_tokens,
            "temperature": temperature,
        }
        try:
            reply, _ = chat_reply(self._endpoint, body)
        except RequestFailed as error:
            self._budget.spend(error)
            return None
        self._kept.add(key, reply)
        return reply


def require_a_verdict(task: JudgeTask, unjudged_N: np.ndarray) -> None:
    """Refuse comparisons of which none has a verdict: their win rate of 0.5 would be no result.

    Args:
        task: of the comparisons.
        unjudged_N: 1 where there is no verdict, the mean over a prompt's answers.

    Raises:
        InputError: all are without.
    """
    require(
        len(unjudged_N) == 0 or unjudged_N.min() < 1,
        f"task {task.name}: the judge {task.judge} at {task.url} gave a verdict ([[A]], [[B]] or [[C]]) in none of "
        f"{len(unjudged_N)} comparisons, read its replies in {task.name}.judge.*.jsonl; does judge_tokens "
        f"({task.judge_tokens}) suffice, and does the model follow instructions?",
    )


def length_controlled_win_rate(wins_N: np.ndarray, length_difference_N: np.ndarray) -> float:
    """Return the win rate at equal lengths, by a logistic model of the outcome in the length difference.

    As in AlpacaEval 2 (Dubois et al. 2024, arXiv:2404.04475) without its term for the difficulty of an instruction,
    which needs the results of other models: ``logit P(win) = a + b tanh(difference / deviation)``, and the rate is at
    difference 0. A small ridge on both keeps them finite where all outcomes are the same.

    Args:
        wins_N: 1, 0 or 0.5.
        length_difference_N: characters of the answer minus the baseline's.
    """
    deviation = float(np.std(length_difference_N)) or 1.0
    x_N2 = np.stack([np.ones_like(wins_N), np.tanh(length_difference_N / deviation)], axis=1)
    weights_2, ridge = np.zeros(2), 1e-2 * np.eye(2)
    for _ in range(100):  # Newton's method; the likelihood is concave
        p_N = 1 / (1 + np.exp(-x_N2 @ weights_2))
        gradient_2 = x_N2.T @ (wins_N - p_N) - ridge @ weights_2
        hessian_22 = (x_N2 * (p_N * (1 - p_N))[:, None]).T @ x_N2 + ridge
        step_2 = np.linalg.solve(hessian_22, gradient_2)
        weights_2 = weights_2 + step_2
        if np.abs(step_2).max() < 1e-10:
            break
    return float(1 / (1 + np.exp(-weights_2[0])))


def extra_metrics(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the metrics of a judged task that are no means over items."""
    rate = length_controlled_win_rate(values["win_rate"], values["length_difference"])
    return {"length_controlled_win_rate": rate}
