"""Which cases of a parametrized law run on every commit, and which only in ``make test-all``."""

from collections.abc import Iterable
from typing import Any

import pytest


def mark_slow(cases: Iterable[Any], slow: Iterable[Any]) -> list[Any]:
    """Return the cases as pytest parameters, those in ``slow`` marked; a name in ``slow`` that is no case fails."""
    cases, slow = list(cases), list(slow)
    unknown = [case for case in slow if case not in cases]
    assert not unknown, f"not among the cases: {unknown}"
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[pytest.mark.slow])
        if case in slow
        else case
        for case in cases
    ]
