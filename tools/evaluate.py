"""``megatron-align evaluate --config eval.yaml``: an evaluation on one process. Also ``python tools/evaluate.py``.

``megatron-align evaluate compare FIRST SECOND`` compares the results of two.

Exit code: 0 done, 2 bad input, 1 any other failure.
"""

from __future__ import annotations

import sys
from pathlib import Path

PROGRAM = "megatron-align evaluate"


def run(arguments: list[str]) -> int:
    """Run with the arguments after ``evaluate``; return the exit code."""
    if arguments[:1] == ["compare"]:
        return _compare(arguments[1:])
    from megatron_align.evaluate import main
    from megatron_align.storage.atomic_write import require_one_process

    require_one_process()
    return main(arguments, PROGRAM)


def _compare(arguments: list[str]) -> int:
    from megatron_align.tools.command import Parser

    about = """Compare two evaluations on the same items: paired differences with 95% intervals, a sentence on each.

Writes SECOND/comparison.json."""
    parser = Parser(f"{PROGRAM} compare", about)
    parser.add_argument("first", metavar="FIRST", help="results of the model that is compared with")
    parser.add_argument("second", metavar="SECOND", help="results of the other model")
    options = parser.parse(arguments)
    from megatron_align.evaluation.compare import compare

    for difference in compare(options.first, options.second):
        print(difference.sentence())
    return 0


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not tools/: its modules would shadow packages
    from megatron_align.tools.main import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
