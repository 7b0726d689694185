"""The console command inside a process of the pool: the CPU seam then stays out of pytest's own process."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

from megatron_align.model.parallel import RankInfo


class Answer(NamedTuple):
    code: int
    out: str
    err: str


def call(rank_info: RankInfo, arguments: list[str]) -> Answer:
    """Run ``megatron-align ARGUMENTS`` in this process."""
    from megatron_align.tools.main import main

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as exit:
            code = exit.code
    return Answer(code, out.getvalue(), err.getvalue())
