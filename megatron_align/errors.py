"""Errors that are one line for people: bad input (the programs exit with 2) and training faults (1)."""

import difflib


class InputError(ValueError):
    """Bad input of any kind (configuration, data, weights, checkpoint, environment).

    The message is a single line: what is needed, what was found, and where (file:line, key, tensor).
    """


class TrainingFault(RuntimeError):
    """Training cannot go on (the loss is not finite, say). Every rank finds it alike; one line says why."""


def nearest(word: str, known: list[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known word closest to ``word``, or ``""``."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


def require(condition: bool, message: str) -> None:
    """Raise InputError unless the condition holds."""
    if not condition:
        raise InputError(message)
