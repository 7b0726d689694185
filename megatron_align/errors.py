"""One-line errors and warnings for users: bad input (the programs exit with 2) and training faults (exit code 1)."""

import fcntl
import logging
import os
import reprlib
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_warned: set[str] = set()
MOST_LISTED = 10  # names in one line
REPORT_SECONDS = 15.0  # that other ranks wait for rank 0 to report an error


class _Quote(reprlib.Repr):
    """Short representations of values, in YAML's words."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist = 3, 6, 6
        self.maxstring = self.maxlong = 80
        self.maxother = 1000  # cut by the caller, from the end

    def repr_NoneType(self, value: None, level: int) -> str:
        return "null"

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"

    def repr_int(self, value: int, level: int) -> str:
        if value.bit_length() > 10_000:  # Python refuses to write more than 4,300 digits
            return "a whole number of thousands of digits"
        return super().repr_int(value, level)


class InputError(ValueError):
    """Bad input of any kind (configuration, data, weights, checkpoint, environment).

    The message is a single line: what is wrong, what was found, where (file:line, key, tensor), and what to do. Line
    breaks in it, from names or values that hold some, become spaces.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


class TrainingFault(RuntimeError):
    """Training cannot continue, for example because the loss is not finite.

    Every rank raises it at the same point; the message is a single line with the reason.
    """


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the candidate that ``word`` may be a misspelling of, or ``""``.

    Another name of the field is not a misspelling: ``ppo`` is not a slip of the pen for ``dpo``, nor ``grpo`` for
    ``orpo``. Up to four letters may be swapped, missing or too many, but not others.
    """
    close: dict[str, int] = {}
    for candidate in candidates:
        most, difference = max(1, len(candidate) // 4), abs(len(word) - len(candidate))
        begun = min(len(candidate), len(word)) >= 3 and (
            candidate.startswith(word) or word.startswith(candidate)
        )
        if difference <= most and (count := _slips(word, candidate)) <= most:
            close[candidate] = count
        elif begun and difference < 20:
            close[candidate] = 10 + difference
    return f"; did you mean '{min(close, key=close.__getitem__)}'?" if close else ""


def _slips(word: str, other: str) -> int:
    """Return the edits between two words: a letter missing, too many, another, or two swapped (Damerau 1964)."""
    substitution = 1 if min(len(word), len(other)) > 4 else 2
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(word, 1):
        before, last, row = row, before, [i]
        for j, wanted in enumerate(other, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != wanted) * substitution)
            if i > 1 and j > 1 and letter == other[j - 2] and word[i - 2] == wanted:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]


def listed(items: Iterable[object], separator: str = ", ", most: int = MOST_LISTED) -> str:
    """Join at most ``most`` items into one line: ``"a, b, c and 240 more"``."""
    texts = [str(item) for item in items]
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more


def shown(value: object) -> str:
    """Return a value from a file or a command line as an error quotes it: what YAML calls it, at most 80 characters."""
    text = _Quote().repr(value)
    return f"{text[:80]}..." if len(text) > 83 else text


def key_text(key: object) -> str:
    """Return a key from a file as an error quotes it: of a text at most 83 characters, others as :func:`shown`."""
    return one_line(key, 83) if isinstance(key, str) else shown(key)


def one_line(message: object, most: int | None = None) -> str:
    """Return somebody else's message (an exception, a server's answer) on one line, of at most ``most`` characters.

    An exception without a message gives the name of its type.
    """
    line = " ".join(str(message).split())
    if not line and isinstance(message, BaseException):
        line = type(message).__name__
    return line if most is None or len(line) <= most else f"{line[: most - 3]}..."


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


def report_once(rank: str, error: Exception, code: int) -> int:
    """Print the error once and return the exit code: every rank raises it, and the first exit stops the others.

    Rank 0 prints it, as some launchers show its output only; another rank prints what rank 0 has not within
    REPORT_SECONDS. Under torchrun each launch has a file that says whether one did, however busy the machine is.
    """
    file = _report_file()
    deadline = time.monotonic() + REPORT_SECONDS
    while rank != "0" and time.monotonic() < deadline and not _is_reported(file):
        time.sleep(0.05)
    with _exclusive(file) as mark:
        if mark is None or os.fstat(mark.fileno()).st_size == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        if mark is not None:
            mark.truncate(1)  # a length without content, which needs no space on a full disk
    return code


@contextmanager
def _exclusive(file: Path | None) -> Iterator[BinaryIO | None]:
    """Open a file that one process has at a time; its lock is freed however its holder ends. None: there is none."""
    try:
        opened = file.open("ab") if file is not None else None
    except OSError:  # a disk without a free inode, or a launcher that has removed its folder
        opened = None
    if opened is None:
        yield None
        return
    with opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield opened


def _report_file() -> Path | None:
    """Return the file that marks an error of this launch as reported; torchrun makes its folder, on each node."""
    of_rank = os.environ.get("TORCHELASTIC_ERROR_FILE")  # .../attempt_0/RANK/error.json
    return Path(of_rank).parents[1] / "reported" if of_rank else None


def _is_reported(file: Path | None) -> bool:
    try:
        return file is not None and file.stat().st_size > 0
    except OSError:
        return False


def silence_libraries() -> None:
    """Silence what libraries report at import and does not concern a user; called before they are imported.

    megatron-core warns that Apex and Transformer Engine are missing, which are not needed; torch of deprecated names,
    and a CUDA build of it on a machine with the CUDA toolkit and no GPU that there is no GPU, which our summary says.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
