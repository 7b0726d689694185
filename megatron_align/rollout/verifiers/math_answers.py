"""Compare mathematical answers with math-verify; imports nothing else, as it is called in processes of its own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any


def judge(answer: str, expected: Sequence[str]) -> dict[str, float]:
    """Return whether an answer equals one of the expected ones; the gold answer comes first, as math-verify wants it.

    Time limits are the caller's: math-verify's own use signals, which only a main thread gets.
    """
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that time limits are the caller's
    from math_verify import parse, verify

    def parsed(text: str) -> Any:
        return parse(text if "\\boxed" in text or "$" in text else f"${text}$", parsing_timeout=None)

    found = parse(answer, parsing_timeout=None)
    return {"math": float(any(verify(parsed(gold), found, timeout_seconds=None) for gold in expected))}
