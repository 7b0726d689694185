"""Rehearse ranks of runs: a JSON list of requests on the standard input, one JSON report a line on the output.

A request: ``{"arguments": [of the run, as for train], "world_size": 8, "stage": 0, "most_micro_batches": null}``.
A request that fails has ``{"error": line}`` in place of a report.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from typing import Any

from megatron_align.errors import InputError


def main() -> int:
    """Answer the requests; return the exit code."""
    requests = json.load(sys.stdin)
    from megatron_align.rehearsal import stub

    try:
        stub.load()
    except InputError as error:
        _answer({"error": str(error)})
        return 2
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from megatron_align.rehearsal.rehearse import install

    install()
    for request in requests:
        _answer(_rehearsed(request))
    return 0


def _rehearsed(request: dict[str, Any]) -> dict[str, Any]:
    from megatron_align.objectives.configuration import parse
    from megatron_align.rehearsal.rehearse import rehearse

    try:
        config = parse(request["arguments"])
        report = rehearse(config, request["world_size"], request["stage"], request.get("most_micro_batches"))
    except InputError as error:
        return {"error": str(error)}
    return report.as_json()


def _answer(value: dict[str, Any]) -> None:
    print(json.dumps(value), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    sys.exit(main())
