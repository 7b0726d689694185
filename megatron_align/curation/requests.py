"""Requests for the quality and the category of a prompt, and the JSON in their replies. The wording is ours."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any


def quality_request(prompt: str) -> str:
    """Return what a model reads that scores a prompt; it replies with ``{"score": ...}``."""
    return (
        "Rate how useful this prompt of a user is for training an assistant, from 0 (no request, spam, unintelligible, "
        "or impossible to answer) to 10 (a clear, realistic and demanding request). Do not answer it. Reply with one "
        f'JSON object and nothing else: {{"score": 0 to 10}}\n\n<User prompt>: {prompt}'
    )


def label_request(prompt: str, categories: Sequence[str]) -> str:
    """Return what a model reads that labels a prompt; it replies with ``{"category": ...}``."""
    names = "\n".join(f"- {category}" for category in categories)
    return (
        f"Choose the category of this prompt of a user among these:\n{names}\n\nDo not answer it. Reply with one JSON "
        f'object and nothing else: {{"category": "the name of one category"}}\n\n<User prompt>: {prompt}'
    )


def parse_score(reply: str) -> float | None:
    """Return the last ``score`` in a reply; None: it holds none that is a finite number."""
    found = None
    for fields in json_objects(reply):
        value = fields.get("score")
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                continue
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            found = float(value)
    return found


def parse_category(reply: str, categories: Sequence[str]) -> str | None:
    """Return the last ``category`` in a reply that is one of the categories, case aside; None: it holds none."""
    known = {category.casefold().strip(): category for category in categories}
    found = None
    for fields in json_objects(reply):
        value = fields.get("category")
        if isinstance(value, str):
            found = known.get(value.casefold().strip(), found)
    return found


def json_objects(reply: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a text, in order, with plain field names."""
    decoder, position = json.JSONDecoder(strict=False), reply.find("{")
    while position >= 0:
        try:
            value, end = decoder.raw_decode(reply, position)
        except (ValueError, RecursionError):
            end = position + 1
        else:
            yield {plain(name): item for name, item in value.items()}
        position = reply.find("{", end)


def plain(name: str) -> str:
    """Return a name without case, spaces and punctuation."""
    return re.sub(r"[\W_]+", "", name).lower()
