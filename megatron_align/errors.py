"""The one exception for what a user got wrong: need, fact and place in one line; the programs exit with 2."""


class InputError(ValueError):
    """Bad input of any kind (configuration, data, weights, checkpoint, environment).

    The message is a single line: what is needed, what was found, and where (file:line, key, tensor).
    """


def nearest(word: str, known: list[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known word closest to ``word``, or ``""``."""
    import difflib

    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
