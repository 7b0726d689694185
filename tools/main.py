"""The console command ``megatron-align TOOL ...``; also ``python -m megatron_align.tools.main``.

A tool is a module of this package with a function ``run(arguments) -> exit code``. Exit codes: 0 success; 2 bad
input, described in one line; 130 stopped by Ctrl-C; others are the tool's own.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

ABOUT = "Tools for alignment training. To train: torchrun -m megatron_align.train --help. Versions: --version"
TOOLS = {
    "adapter": "merge a low-rank adapter into its base model, or extract one from a trained model",
    "chat": "talk to a model in the terminal",
    "convert": "convert between Hugging Face folders and checkpoints, and verify that both hold the same model",
    "data": "work on data before training: near duplicates, labels, selection, mixtures",
    "evaluate": "evaluate a model on tasks: loss, preference pairs, multiple choice, generated answers",
    "generate": "generate completions for the prompts of a file, with a Hugging Face folder or a checkpoint",
    "merge": "merge Hugging Face models into one: model stock, task arithmetic, linear and others",
    "pas": "prompt augmentation: make its training data, augment prompts",
    "plan": "estimate memory and time of a run, and list the parallel layouts that fit",
    "prepare": "tokenise data before training, and report statistics and samples",
    "report": "draw the metrics of one or several runs: one HTML page and PNG files",
    "sample": "make preference data: sample answers, score and filter them",
}

# After a kill or Ctrl-C. Of convert not verify, which writes nothing; of adapter not extract; of data not mix.
RESUMING = ("adapter", "convert", "data", "merge", "pas", "prepare", "generate", "sample")
_NOT_RESUMING = (["convert", "verify"], ["adapter", "extract"], ["data", "mix"])


def main(arguments: list[str] | None = None) -> int:
    """Run with command-line arguments; return the exit code."""
    from megatron_align.errors import InputError, silence_libraries
    from megatron_align.tools.command import choose
    from megatron_align.training.stop import SecondInterrupt, interrupted
    from megatron_align.version import versions

    silence_libraries()
    logging.getLogger("megatron.core").setLevel(logging.CRITICAL)  # its faults are also raised as errors
    is_command = arguments is None
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if "--version" in arguments:
            print(versions())
            return 0
        name, rest = choose("megatron-align", ABOUT, TOOLS, arguments)
        # In a chat every Ctrl-C stops one answer only.
        with nullcontext() if name == "chat" else SecondInterrupt():
            return importlib.import_module(f"megatron_align.tools.{name}").run(rest)
    except KeyboardInterrupt:
        return interrupted(_interruption(arguments), ends_process=is_command)
    except InputError as error:
        line = str(error)
    except OSError as error:  # a full disk, a folder without permission: the operating system's message
        line = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    print(f"error: {line}", file=sys.stderr, flush=True)
    return 2


def _interruption(arguments: Sequence[str]) -> str:
    """Return one line about a tool that Ctrl-C ended: what the same command will do."""
    resumes = arguments[0] in RESUMING and list(arguments[:2]) not in _NOT_RESUMING
    then = "resumes after what is complete" if resumes else "starts again"
    return f"interrupted: the output is not written; the same command {then}"


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not tools/: its modules would shadow packages
    sys.exit(main())
