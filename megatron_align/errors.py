"""One-line errors and warnings for users: bad input (the programs exit with 2) and training faults (exit code 1)."""

import difflib
import os
import sys

_warned: set[str] = set()


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


def warn_once(line: str, key: str | None = None) -> None:
    """Print ``warning: LINE`` to stderr: one process per node, once.

    Args:
        line: one line, as in an error: what is wrong, what was found, where, what follows from it.
        key: of warnings of which only the first is printed; None: the line itself.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0" or (key or line) in _warned:
        return
    _warned.add(key or line)
    print(f"warning: {line}", file=sys.stderr, flush=True)
