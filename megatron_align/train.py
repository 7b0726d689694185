"""Train a model: ``torchrun --nproc-per-node N -m megatron_align.train --config run.yaml [--section.key value]``.

``--dry_run`` checks the run, prints layout, batch, memory and steps, and writes nothing; ``--dry_run=64`` does so for
64 ranks. Without a launcher it takes the fewest ranks that the layout needs.

Exit codes: 0 completed; 85 stopped by a signal after saving, start it again to resume; 130 stopped by Ctrl-C, after
saving unless it was pressed twice; 2 bad input, explained in one line; 1 any other failure. torchrun turns each of them
into 1: the file ``checkpoint.dir/requeue`` stands for 85.
Heavy imports are deferred until the arguments have been read.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run with command-line arguments; return the exit code."""
    from megatron_align.errors import InputError, report_once, silence_libraries

    silence_libraries()
    from megatron_align.training.stop import EXIT_INTERRUPTED, Interrupted, SecondInterrupt, interrupted

    is_command = arguments is None
    arguments = sys.argv[1:] if arguments is None else arguments
    rank = os.environ.get("RANK", "0")
    with SecondInterrupt():
        try:
            return _run(arguments, rank)
        except InputError as error:
            return report_once(rank, error, 2)
        except Interrupted:  # the log has a line about it
            return EXIT_INTERRUPTED
        except KeyboardInterrupt:
            return interrupted(_interruption(arguments), ends_process=is_command)


def _run(arguments: list[str], rank: str) -> int:
    from megatron_align.errors import TrainingFault, report_once
    from megatron_align.objectives.configuration import parse
    from megatron_align.version import versions

    if "--version" in arguments:
        print(versions())
        return 0
    dry, ranks = _dry_run(arguments)
    config = parse(arguments)
    from megatron_align.model.parallel import RankInfo
    from megatron_align.monitoring.memory import OutOfMemory
    from megatron_align.training.dry_run import dry_run
    from megatron_align.training.loop import run
    from megatron_align.training.stop import EXIT_REQUEUE
    from megatron_align.training.watchdog import AlreadyReported, RankLost

    try:
        if dry:
            dry_run(config, RankInfo.from_environment(), ranks)
            return 0
        return 0 if run(config, RankInfo.from_environment()) else EXIT_REQUEUE
    except (TrainingFault, OSError) as error:  # OSError: disk full, a rank that did not join in time, ...
        return report_once(rank, error, 1)
    except (RankLost, OutOfMemory) as error:  # raised on one rank only, which prints at once
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except AlreadyReported:
        return 1


def _interruption(arguments: list[str]) -> str:
    """Return one line about a run that Ctrl-C ended outside of its steps: what the same command will do."""
    from megatron_align.checkpoint.folder import list_steps
    from megatron_align.errors import InputError
    from megatron_align.objectives.configuration import parse

    try:
        folder, is_dry = Path(parse(arguments).checkpoint.dir), _dry_run(arguments)[0]
    except InputError:
        is_dry = True
    if is_dry:
        return "interrupted: nothing was changed"
    steps = list_steps(folder)
    then = f"resumes after step {steps[-1][0]}" if steps else "starts again, as no step was saved"
    return f"interrupted: nothing that was saved is lost, the same command {then}"


def _dry_run(arguments: list[str]) -> tuple[bool, int | None]:
    """Return whether this is a dry run, and for how many ranks; None: not given."""
    from megatron_align.config.run import DRY_RUN
    from megatron_align.errors import InputError

    flags = [argument for argument in arguments if argument.partition("=")[0] == DRY_RUN]
    ranks = flags[-1].partition("=")[2] if flags else ""
    if ranks and not (ranks.isdecimal() and int(ranks) >= 1):
        raise InputError(f"{DRY_RUN}=RANKS needs a positive whole number, got '{ranks}'")
    return bool(flags), int(ranks) if ranks else None


if __name__ == "__main__":
    sys.exit(main())
