"""The console command ``megatron-align TOOL ...``; also ``python -m megatron_align.tools.main``.

A tool is a module beside this one with a function ``run(arguments) -> exit code``. Exit codes: 0 done; 2 bad
input, one line says what; anything else is the tool's own.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from pathlib import Path

ABOUT = "Tools around alignment training; the training itself is: torchrun -m megatron_align.train --help"
TOOLS = {
    "convert": "Hugging Face folder <-> checkpoint, and proof that both hold the same model",
    "merge": "merge Hugging Face folders into one: model stock, task arithmetic, linear and others",
    "plan": "say what a run takes in memory and time, and which layouts fit",
    "prepare": "tokenise data once, before training, and report what it holds",
    "report": "draw the metrics of one run or several: a page that needs nothing else, and pictures",
}


def main(arguments: list[str] | None = None) -> int:
    """Run with command-line arguments; return the exit code."""
    from megatron_align.errors import InputError
    from megatron_align.tools.command import choose

    _quiet()
    try:
        name, rest = choose("megatron-align", ABOUT, TOOLS, sys.argv[1:] if arguments is None else arguments)
        return importlib.import_module(f"megatron_align.tools.{name}").run(rest)
    except InputError as error:
        line = str(error)
    except OSError as error:  # a full disk, a folder that may not be read: the system's own words
        line = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    print(f"error: {line}", file=sys.stderr, flush=True)
    return 2


def _quiet() -> None:
    """Silence what users can do nothing about: absent extras that are not needed, calls by megatron-core."""
    logging.getLogger("megatron.core").setLevel(logging.CRITICAL)  # its faults come as errors, too
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not tools/: its files would hide packages
    sys.exit(main())
