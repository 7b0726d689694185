"""Read the JSON that critics reply with, inside whatever text they put around it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from megatron_align.augmentation.texts import FAULTS
from megatron_align.curation.requests import json_objects, plain

UNNAMED = "unnamed"  # a complement was refused, and no fault was named
_TRUTH = {"yes": True, "true": True, "no": False, "false": False}


@dataclass(frozen=True, slots=True)
class Verdict:
    """A critic's opinion of a complement.

    Args:
        faults: names in ``FAULTS``, or ``UNNAMED``; empty: it is good.
        reason: in the critic's words.
        correction: the complement that the critic would write; empty: it gave none.
    """

    faults: tuple[str, ...]
    reason: str
    correction: str


def parse_verdict(reply: str) -> Verdict | None:
    """Return the last verdict in a reply; None: it holds none.

    Field names are compared without case, spaces and punctuation: ``FinalAPE`` and ``Final APE``, ``Is_correct`` and
    ``is correct`` are read. A verdict that names a fault refuses, whatever else it says.
    """
    found = None
    for fields in json_objects(reply):
        correct = fields.get("iscorrect")
        if isinstance(correct, str):
            correct = _TRUTH.get(plain(correct))
        if not isinstance(correct, bool):
            continue
        named = _faults(fields.get("faults", fields.get("fault")))
        faults = named or (() if correct else (UNNAMED,))
        found = Verdict(faults, _text(fields.get("reason")), _text(fields.get("finalape")) if faults else "")
    return found


_NAMES = {plain(name): name for name in FAULTS}


def _faults(value: Any) -> tuple[str, ...]:
    """Return the faults that a field names, by our names; words that deny a fault are none."""
    listed = value if isinstance(value, list) else re.split(r"[,;]", value) if isinstance(value, str) else []
    words = [plain(item) for item in listed if isinstance(item, str)]
    named = [
        _NAMES.get(name, UNNAMED)
        for name in words
        if name not in ("", "none", "no", "null", "na", "nofaults")
    ]
    return tuple(dict.fromkeys(named))


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""
