"""Evaluate a model: ``torchrun --nproc-per-node N -m megatron_align.evaluate --config eval.yaml [--model PATH ...]``.

The model is a Hugging Face folder or one of our checkpoints, on any layout, without export. Without a launcher it runs
on one process, as ``megatron-align evaluate`` does.

Exit codes: 0 completed; 130 stopped by Ctrl-C; 2 bad input, explained in one line; 1 any other failure. torchrun turns
each of them into 1.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

PROGRAM = "python -m megatron_align.evaluate"


def main(arguments: list[str] | None = None, program: str = PROGRAM) -> int:
    """Run with command-line arguments; return the exit code."""
    from megatron_align.errors import InputError, report_once, silence_libraries

    silence_libraries()

    rank = os.environ.get("RANK", "0")
    try:
        from megatron_align.evaluation.config import parse

        config = parse(sys.argv[1:] if arguments is None else arguments, program)
        from megatron_align.evaluation.results import table_of
        from megatron_align.evaluation.run import evaluate
        from megatron_align.training.watchdog import AlreadyReported, RankLost

        try:
            results = evaluate(config)
        except RankLost as error:  # raised on one rank only, which prints at once
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 1
        except AlreadyReported:
            return 1
    except InputError as error:
        return report_once(rank, error, 2)
    except OSError as error:
        return report_once(rank, error, 1)
    if rank == "0":
        folders = (
            [f"{config.out}/{name}" for name in config.adapter]
            if isinstance(config.adapter, dict)
            else [config.out]
        )
        written = ", ".join(f"{folder}/results.json" for folder in folders)
        print(f"{table_of(results['tasks'])}\nresults: {written}")
    return 0


class _Callable(ModuleType):
    """This module, callable: ``from megatron_align import evaluate`` is the function, also once it was imported."""

    def __call__(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        from megatron_align.evaluation.run import evaluate

        return evaluate(*arguments, **options)


def _command() -> int:
    from megatron_align.training.stop import SecondInterrupt, interrupted

    try:
        with SecondInterrupt():
            return main()
    except KeyboardInterrupt:
        line = "interrupted: no results were written; the same command starts again"
        return interrupted(line, ends_process=True)


if __name__ == "__main__":
    sys.exit(_command())
sys.modules[__name__].__class__ = _Callable
