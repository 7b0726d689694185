"""Checks of generated answers: each turns an answer and its record into numbers from 0 to 1."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_align.data.formats.fields import RawRecord, bad_field
from megatron_align.errors import InputError, require
from megatron_align.rollout.prompts import PromptRecord
from megatron_align.rollout.verifiers import instructions, math_answers
from megatron_align.rollout.verifiers.sandbox import passes

Scores = dict[str, float]
ANSWERS = ("answer", "reference", "target", "completion")  # the first that a record has is its answer


@dataclass(frozen=True, slots=True)
class Check:
    """One way to judge an answer.

    Args:
        metrics: names of its numbers, the primary one first.
        expected: reads from a record what the answer is compared with.
        judge: ``(answer, expected) -> scores by metric``.
        extracts: ``extract`` applies to it.
        package: an optional package that it needs; None: none.
        waits: it waits for other processes: several answers are judged at once.
    """

    metrics: tuple[str, ...]
    expected: Callable[[PromptRecord], Any]
    judge: Callable[[str, Any], Scores]
    extracts: bool = True
    package: str | None = None
    waits: bool = False

    def require(self, task: str, extract: str | None) -> None:
        """Check that the check can run with a task's options.

        Raises:
            InputError: a package is missing, or ``extract`` is no regular expression or does not apply.
        """
        require(
            self.package is None or importlib.util.find_spec(self.package.replace("-", "_")) is not None,
            f"task {task}: this check needs the package {self.package}, which is not installed: "
            "pip install 'megatron-align[eval]'",
        )
        require(
            self.extracts or extract is None,
            f"task {task}: extract does not apply to this check, got {extract}",
        )
        try:
            re.compile(extract or "")
        except re.error as error:
            raise InputError(
                f"task {task}: extract must be a regular expression, got {extract!r}: {error}"
            ) from error


def extracted(answer: str, extract: str | None) -> str:
    """Return the part of an answer that is judged: the last match of ``extract``, nothing if there is none."""
    if extract is None:
        return answer
    matches = list(re.finditer(extract, answer))
    if not matches:
        return ""
    return (matches[-1][1] if matches[-1].re.groups else matches[-1][0]) or ""


def expected_answers(record: PromptRecord) -> tuple[str, ...]:
    """Return the accepted answers of a record: its field of ``ANSWERS`` (text, number, list), or last assistant turn.

    Raises:
        InputError: it has neither.
    """
    name = next((name for name in ANSWERS if name in record.raw), ANSWERS[0])
    value: Any = record.raw.get(name, record.answer)
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(v, (str, int, float)) and not isinstance(v, bool) for v in values):
        raise bad_field(record.where, name, "text, a number or a list of them", value)
    return tuple(str(v) for v in values)


def _normal(text: str) -> str:
    return " ".join(text.split())


def _exact_match(answer: str, expected: tuple[str, ...]) -> Scores:
    return {"exact_match": float(_normal(answer) in map(_normal, expected))}


def _contains(answer: str, expected: tuple[str, ...]) -> Scores:
    return {"contains": float(any(_normal(each) in _normal(answer) for each in expected))}


def _instructions(record: PromptRecord) -> Mapping[str, Any]:
    raw: RawRecord = record.raw
    instructions.require_known(raw, record.where)
    return raw


_BLOCK = re.compile(r"```[\w+-]*\n(.*?)```", re.DOTALL)


def _tests(record: PromptRecord) -> tuple[str, str]:
    """Return what comes before an answer's code, and its tests: HumanEval's fields, or MBPP's.

    Raises:
        InputError: the record has neither.
    """
    raw, where = record.raw, record.where
    # A prompt that is text is continued by the answer; of messages the answer holds the complete code.
    before = f"{record.prompt}" if isinstance(record.prompt, str) else ""
    if isinstance(raw.get("test"), str):
        entry = raw.get("entry_point")
        if not isinstance(entry, str) or not entry.isidentifier():
            raise bad_field(where, "entry_point", "the name of the tested function", entry)
        return before, f"{raw['test']}\ncheck({entry})\n"
    tests = raw.get("test_list")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise InputError(
            f"{where}: a task on code must have test with entry_point, or test_list; got {sorted(raw)}"
        )
    return before, "\n".join([raw.get("test_setup_code") or "", *tests]) + "\n"


def _code(answer: str, expected: tuple[str, str]) -> Scores:
    before, tests = expected
    blocks = _BLOCK.findall(answer)
    code = blocks[-1] if blocks and not before else answer
    return {"pass_rate": float(passes(f"{before}{code}\n\n{tests}"))}


CHECKS: dict[str, Check] = {
    "code": Check(("pass_rate",), _tests, _code, extracts=False, waits=True),
    "exact_match": Check(("exact_match",), expected_answers, _exact_match),
    "contains": Check(("contains",), expected_answers, _contains),
    "math": Check(("math",), expected_answers, math_answers.judge, package="math-verify"),
    "ifeval": Check(instructions.METRICS, _instructions, instructions.judge, extracts=False),
}
