"""One-line errors for users: bad input (the programs exit with 2) and training faults (exit code 1)."""

import difflib


class InputError(ValueError):
    """Bad input of any kind (configuration, data, weights, checkpoint, environment).

    The message is a single line: what is wrong, what was found, where (file:line, key, tensor), and what to do.
    """


class TrainingFault(RuntimeError):
    """Training cannot continue, for example because the loss is not finite.

    Every rank raises it at the same point; the message is a single line with the reason.
    """


def nearest(word: str, candidates: list[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the candidate closest to ``word``, or ``""`` if none is close."""
    match = difflib.get_close_matches(word, candidates, n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


def require(condition: bool, message: str) -> None:
    """Raise InputError with ``message`` unless the condition holds."""
    if not condition:
        raise InputError(message)
