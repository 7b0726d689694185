"""The date that a chat template reads (``strftime_now``): it is in the samples, so it is in their store's key."""

from __future__ import annotations

import json
from datetime import date, datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes

from megatron_align.data.tokenize.chat_template import parse_template
from megatron_align.errors import InputError

_FUNCTION = "strftime_now"
_ANY_FORMAT = "%Y-%m-%d %H:%M:%S"  # of a template that computes its format


def parse_date(text: str, option: str = "data.template_date") -> datetime:
    """Return the date that an option gives. Raises InputError if it is no ISO date."""
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(
            f"{option} must be a date such as 2024-07-26, or a date and time, got '{text}'"
        ) from error


def fixed_date(texts: list[str], given: str | None, before: str | None = None) -> str | None:
    """Return the ISO date that chat templates read for as long as a job takes, over all its starts.

    Args:
        texts: of the templates.
        given: date of the options; None: none.
        before: date of an earlier start of the same job; None: there was none.

    Returns:
        ``given``, else ``before``, else today; None: no template reads the clock.
    """
    if not reads_of_clock(texts, datetime.now()):
        return None
    return given or before or date.today().isoformat()


def reads_of_clock(texts: list[str], now: datetime) -> dict[str, str]:
    """Return what chat templates read from the clock: each format, and what it gives ``now``; empty: nothing."""
    formats = {form for text in texts if _FUNCTION in text for form in _formats(text)}
    return {form: now.strftime(form) for form in sorted(formats)}


def tokenizer_templates(folder: str) -> list[str]:
    """Return the texts of all chat templates in a tokenizer's folder."""
    files = [Path(folder) / "chat_template.jinja", *Path(folder).glob("additional_chat_templates/*.jinja")]
    texts = [text for file in files if (text := _text(file)) is not None]
    for name in ("tokenizer_config.json", "chat_template.json"):
        try:
            content = json.loads(_text(Path(folder) / name) or "{}")
        except (ValueError, RecursionError):  # loading the tokenizer reports it
            continue
        template: Any = content.get("chat_template") if isinstance(content, dict) else None
        listed = template if isinstance(template, list) else [{"template": template}]
        texts += [t["template"] for t in listed if isinstance(t, dict) and isinstance(t.get("template"), str)]
    return texts


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # absent, or reported when it is used
        return None


def _formats(text: str) -> set[str]:
    """Return the formats that a template gives to ``strftime_now``."""
    try:
        tree = parse_template(text)
    except (TemplateError, RecursionError):  # rendering reports it
        return {_ANY_FORMAT}
    calls = [call for call in tree.find_all(nodes.Call) if _is_clock(call.node)]
    tests = [test for test in tree.find_all(nodes.Test) if _is_clock(test.node)]  # `is defined` reads no time
    names = [name for name in tree.find_all(nodes.Name) if _is_clock(name)]
    formats = [call.args[0].value for call in calls if call.args and isinstance(call.args[0], nodes.Const)]
    known = len(formats) == len(calls) and len(calls) + len(tests) == len(names)
    return {str(form) for form in formats} | (set() if known else {_ANY_FORMAT})


def _is_clock(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == _FUNCTION
