"""Answer keys that no option has: a misspelling, an option of another section, a name known from another program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from itertools import zip_longest
from typing import Any

from megatron_align.config.familiar_names import answer, plain
from megatron_align.errors import MOST_LISTED, listed, nearest

Owners = Callable[[str], list[str]]  # from an objective's option to the objectives that have it
_DEEPEST = 8  # of a foreign configuration that is searched for names we know
# What a section probably is where it is given a text instead of options.
OPTION_OF_TEXT = {
    "model": "model.path",
    "data": "data.train",
    "objective": "objective.name",
    "reference": "reference.path",
    "critic": "critic.path",
    "checkpoint": "checkpoint.dir",
    "logging": "logging.wandb",
}
# Keys that look like an option of another section, and are not built.
NOT_BUILT = {
    "critic.adapter": "an adapter of the critic is not built: all of its weights are trained",
}


def unknown_keys(unknown: Mapping[str, Any], sections: Mapping[str, type], owners: Owners) -> str:
    """Return one line about keys that do not exist.

    Args:
        unknown: their values by key.
        sections: the sections of a run, that of its objective among them.
        owners: of options of objectives.
    """
    options = [f"{section}.{option.name}" for section, kind in sections.items() for option in fields(kind)]
    names = [name for key, value in unknown.items() for name in _known_within(key, value, options)]
    answers = [_answer(name, options, list(sections), owners) for name in names[:MOST_LISTED]]
    if len(names) == 1:
        return f"unknown configuration key '{names[0][:80]}'{answers[0] or ' (--help lists all)'}"
    clauses = [f" ({text.strip(' :;?')})" if text else "" for text in answers]
    several = [f"'{name[:80]}'{clause}" for name, clause in zip_longest(names, clauses, fillvalue="")]
    return f"unknown configuration keys {listed(several)}"


def _known_within(key: str, value: Any, options: Sequence[str], depth: int = 0) -> list[str]:
    """Return the keys inside of an unknown section that have an answer; without any, the section's."""
    if not isinstance(value, Mapping) or depth > _DEEPEST or key in NOT_BUILT:
        return [key]
    inside = [
        name
        for inner, content in list(value.items())[:100]
        for name in _known_within(f"{key}.{inner}", content, options, depth + 1)
        if _same_option(name, options) or answer(_last(name))
    ]
    return inside or [key]


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _same_option(key: str, options: Sequence[str]) -> str | None:
    """Return the option of this name in another section."""
    word = plain(_last(key))
    return next((option for option in options if _last(option) == word), None)


def _answer(key: str, options: Sequence[str], sections: Sequence[str], owners: Owners) -> str:
    """Return what probably was meant."""
    if "." not in key and key in sections:
        return ""
    if key in NOT_BUILT:
        return f": {NOT_BUILT[key]}"
    if (option := _same_option(key, options)) and option != key:
        return f"; did you mean '{option}'?"
    known = answer(_last(key))
    if known is not None:
        return f": {known}"
    if misspelt := nearest(key, [*options, *sections] if "." not in key else options):
        return misspelt
    word = plain(_last(key))
    if objectives := owners(word):
        return f": it is an option of objective.name {listed(objectives)}"
    if misspelt := nearest(word, [_last(option) for option in options]):
        return misspelt.replace(word := misspelt.split("'")[1], _same_option(word, options) or word)
    return ""
