"""Match texts with a regular expression: the child process of ``patterns.py``, standard library only.

The first line of stdin is ``[pattern, fullmatch, seconds]`` in JSON, each further one a text, answered by 1 or 0.
A match that takes longer than ``seconds`` of processor time ends the process: the kernel's signal does, as Python runs
nothing else during a match.
"""

import json
import re
import signal
import sys


def main() -> None:
    """Answer texts until stdin ends."""
    source, fullmatch, seconds = json.loads(sys.stdin.readline())
    pattern = re.compile(source)
    matches = pattern.fullmatch if fullmatch else pattern.search
    for line in sys.stdin:
        text = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        found = matches(text) is not None
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(int(found), flush=True)


if __name__ == "__main__":
    main()
