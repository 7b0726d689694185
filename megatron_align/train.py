"""Train a model: ``torchrun --nproc-per-node N -m megatron_align.train --config run.yaml [--section.key value]``.

``--dry_run`` checks all of it, prints layout, batch, memory and steps, and stops; ``--dry_run=64``: as if on 64
ranks. Without a launcher it takes the fewest ranks that the layout needs.

Exit codes: 0 done; 85 asked to stop by a signal, saved, wants to be started again; 2 bad input, one line says what;
1 any other fault. torchrun turns each into 1: the file ``checkpoint.dir/requeue`` says the same as 85.
Heavy imports wait until the arguments have been read.
"""

from __future__ import annotations

import os
import sys
import time
import warnings


def main(arguments: list[str] | None = None) -> int:
    """Run with command-line arguments; return the exit code."""
    # Apex and Transformer Engine are absent and not needed; torch warns of names that megatron-core uses.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    from megatron_align.config import parse
    from megatron_align.errors import InputError, TrainingFault

    # megatron-core orders its tensor-parallel collectives and GEMMs by this; it must be set before CUDA starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    rank = os.environ.get("RANK", "0")
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
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
        except (TrainingFault, OSError) as error:  # OSError: disk full, a rank that did not come in time, ...
            return _fail(rank, error, 1)
        except (RankLost, OutOfMemory) as error:  # one rank only gets here: it speaks at once
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 1
        except AlreadyReported:
            return 1
    except InputError as error:
        return _fail(rank, error, 2)


def _dry_run(arguments: list[str]) -> tuple[bool, int | None]:
    """Return whether a dry run is asked for, and on how many ranks; None: not said."""
    from megatron_align.config.run import DRY_RUN
    from megatron_align.errors import InputError

    asked = [argument for argument in arguments if argument.partition("=")[0] == DRY_RUN]
    ranks = asked[-1].partition("=")[2] if asked else ""
    if ranks and not (ranks.isdecimal() and int(ranks) >= 1):
        raise InputError(f"{DRY_RUN}=RANKS needs a positive whole number, got '{ranks}'")
    return bool(asked), int(ranks) if ranks else None


def _fail(rank: str, error: Exception, code: int) -> int:
    """Say the reason once: most errors are found by every rank, and rank 0's end makes the launcher end the rest."""
    if rank != "0":
        time.sleep(5)
    print(f"error: {error}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
