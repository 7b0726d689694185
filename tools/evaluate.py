"""``megatron-align evaluate --config eval.yaml``: an evaluation on one process. Also ``python tools/evaluate.py``.

Exit code: 0 done, 2 bad input, 1 any other failure.
"""

from __future__ import annotations

import sys
from pathlib import Path

PROGRAM = "megatron-align evaluate"


def run(arguments: list[str]) -> int:
    """Run with the arguments after ``evaluate``; return the exit code."""
    from megatron_align.evaluate import main
    from megatron_align.storage.atomic_write import require_one_process

    require_one_process()
    return main(arguments, PROGRAM)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not tools/: its modules would shadow packages
    from megatron_align.tools.main import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
